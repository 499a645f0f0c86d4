"""Settings of online preference learning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from diffusion_align.objectives.declared import declared
from diffusion_align.training.engine.config import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    PlanNotes,
    Positive,
    PositiveFloat,
)
from diffusion_align.training.online.config import LONGEST_SCHEDULE, RenoisingConfig
from diffusion_align.training.policy.config import MemoryNeeds, VAEJob, Work
from diffusion_align.training.policy.preference_config import PreferenceSettings

#: Settings of advantages, which pairs have no use for.
ADVANTAGES = ("advantage_baseline", "advantage_scale", "history_size", "history_min_count", "advantage_clip")


@dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(PreferenceSettings, RenoisingConfig):
    """Preference learning from own pictures: draw several of each prompt, score them, train on pairs of them; again."""

    method: ClassVar[str] = "online-dpo"
    changeable: ClassVar[frozenset[str]] = frozenset({"eval_rounds"})
    for_pairs: ClassVar[tuple[str, ...]] = (*PreferenceSettings.for_pairs, "label_temperature")

    # -- objective
    beta: PositiveFloat = 2000.0
    """Strength of the pull to the reference; the logit is 0.5 * beta * (s_chosen - s_rejected)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of pairs that the scorers order wrongly."""
    label_temperature: PositiveFloat | None = None
    """Soft labels: chosen is preferred with probability sigmoid(gap of rewards / label_temperature), for losses that
    take them; unset: it is certain."""
    kl_beta: NonNegativeFloat = 0.0
    """Weight of the squared distance to the base's predictions, which holds the policy where the reference moves."""
    train_guided: bool = False
    """Errors are those of the guided prediction that pictures are drawn with, as in nft; else of the model itself."""

    # -- a round
    standardise: Literal["running", "prompt", "none"] = "running"
    """How an ensemble's members become comparable: by the mean and deviation of all their rewards so far, by those of
    each prompt's pictures, or not at all."""
    eta: NonNegativeFloat = 0.0
    """Fresh noise in the sampler's steps, for samplers that take it (DDIM: 1 is DDPM)."""
    initial_noise: Literal["independent", "shared"] = "independent"
    """Whether a prompt's pictures start from their own noise or all from the same (which needs eta)."""
    draw_from: Literal["policy", "reference"] = "policy"
    """Whose pictures are compared."""
    pairing: Literal["best_worst", "random", "all", "lists"] = "best_worst"
    """Which pictures of a prompt are compared: the best with the worst, the second best with the second worst, and so
    on; random pairs; all pairs; or all as one list, for losses on lists."""
    pairs_per_prompt: Positive = 1
    """Pairs of each prompt, for best_worst and random."""
    updates_per_picture: Positive = 8
    """Noise levels each pair is trained at. Drawing a picture costs far more than one of them."""
    num_iterations: Positive = 1
    """Passes over a round's pairs and noise levels."""
    max_timestep: Positive = LONGEST_SCHEDULE
    """Timesteps are drawn uniformly from [min_timestep, max_timestep)."""

    # -- what is left out
    min_spread: NonNegativeFloat = 0.0
    """Prompts whose rewards deviate less than this are left out: the scorers' noise is all that differs there."""
    min_gap: NonNegativeFloat = 0.0
    """Pairs whose rewards differ by no more than this are left out; equal rewards always are."""
    min_distance: NonNegativeFloat = 0.0
    """Pairs whose latents differ by less than this (root mean square, in deviations of the latents: about 1) are left
    out: they are nearly the same picture."""

    # -- human pairs
    replay_share: Fraction = 0.0
    """Share of each micro-batch that is pairs of replay_dataset: a whole number of them."""
    replay_dataset: str = "scenes-pairs"
    """Pairs that are mixed in: shipped name, hub data set, parquet file or folder, or an image folder."""
    replay_split: str = "train"
    """Its split."""

    # -- rounds
    eval_rounds: NonNegative = 0
    """Rounds between comparisons of the policy with its base and with itself one comparison earlier, by all scorers, on
    the validation's prompts and seeds (rounds.jsonl); 0 switches it off. Needs eval_steps (max_steps will do), which
    looks at the last round."""

    # -- reference
    reference: Literal["frozen", "ema", "sync"] = "frozen"
    """What the policy is compared with: the base; an average of past policies; or what the policy was when it was last
    copied."""
    reference_decay: Fraction = 0.99
    """reference ema: decay for each optimiser step."""
    reference_sync_steps: Positive | None = None
    """reference sync: optimiser steps between copies; unset: one at the start of every round."""
    reference_sync_alpha: Annotated[float, Field(gt=0, le=1)] = 1.0
    """reference sync: share of the policy in the new reference; the rest is the old one (TR-DPO, 2404.09656: 0.6)."""

    nesterov: NonNegativeFloat = 0.0
    """reference sync: start every round this share of the last round's way further on than that ended, policy and
    reference (APO-Nesterov, 2410.06293; 0.3); 0 switches it off."""

    extragradient: bool = False
    """EGPO (2503.08942), for scorers that disagree, or judges that are not transitive: every second round goes back to
    where the one before began, and trains on its pictures again, compared with those of the policy in between. Needs
    loss_type ipo, whose targets are the probabilities to beat an opponent, and the frozen reference."""
    judge_temperature: PositiveFloat = 1.0
    """extragradient: one picture beats another with the scorers' mean probability sigmoid(gap / judge_temperature); a
    small one gives each scorer a vote."""

    @property
    def replayed(self) -> int:
        """Human pairs in a micro-batch."""
        return round(self.replay_share * self.per_device_train_batch_size)

    @property
    def own(self) -> int:
        """Pairs of own pictures in a micro-batch."""
        return self.per_device_train_batch_size - self.replayed

    @property
    def most_pairs(self) -> int:
        """Pairs of a prompt if none is left out."""
        drawn = self.num_generations
        return {"all": drawn * (drawn - 1) // 2, "lists": 1}.get(self.pairing, self.pairs_per_prompt)

    @property
    def members(self) -> int:
        """Pictures of a list."""
        return self.num_generations if self.pairing == "lists" else 2

    @property
    def follows(self) -> bool:
        """Whether the reference is another one than the base."""
        return self.reference != "frozen"

    def items_per_rollout(self) -> int:
        return self.prompts_per_rollout * self.most_pairs * self.updates_per_picture

    def passes(self) -> int:
        return self.num_iterations

    def check(self) -> None:
        self._check_pairs()
        self._check_loss()
        self._check_unused()
        if self.extragradient:
            self._check_extragradient()
        if self.nesterov:
            self._check_nesterov()
        super().check()
        if self.replay_share * self.per_device_train_batch_size != self.replayed:
            raise ValueError(
                f"replay_share = {self.replay_share}: of per_device_train_batch_size = "
                f"{self.per_device_train_batch_size} pairs that is no whole number"
            )
        if self.eval_rounds and not self.eval_steps:
            raise ValueError(
                f"eval_rounds = {self.eval_rounds} needs eval_steps, e.g. max_steps: it looks at the last round"
            )
        if not self.own:
            raise ValueError("replay_share = 1 leaves no pair of own pictures: that is train dpo")
        if self.min_timestep >= self.max_timestep:
            raise ValueError(
                f"min_timestep = {self.min_timestep} must be smaller than max_timestep = {self.max_timestep}"
            )

    def _check_pairs(self) -> None:
        """Raises ValueError where a prompt's pictures do not make the pairs."""
        drawn, wanted = self.num_generations, self.pairs_per_prompt
        if drawn < 2:
            raise ValueError("num_generations = 1: a pair needs two pictures of a prompt")
        most = {"best_worst": drawn // 2, "random": drawn * (drawn - 1) // 2, "all": 1, "lists": 1}[self.pairing]
        if wanted > most:
            raise ValueError(
                f"pairs_per_prompt = {wanted}: pairing {self.pairing} takes every picture, leave it at 1"
                if self.pairing in ("all", "lists")
                else f"pairs_per_prompt = {wanted}: pairing {self.pairing} makes {most} of {drawn} pictures at most"
            )
        if self.initial_noise == "shared" and not self.eta:
            raise ValueError("initial_noise shared needs eta above 0: the pictures of a prompt would all be the same")
        if self.standardise == "prompt" and self.rollout_batch_size % drawn:
            raise ValueError(
                f"standardise prompt: a prompt's {drawn} pictures must be scored at once, so rollout_batch_size = "
                f"{self.rollout_batch_size} must be a multiple of num_generations"
            )

    def _check_nesterov(self) -> None:
        """Raises ValueError where the weights cannot be extrapolated between rounds."""
        by_round = self.reference == "sync" and self.reference_sync_steps is None and self.reference_sync_alpha == 1
        wrong = {
            "a reference that is copied at the start of every round (reference sync, whole)": not by_round,
            "use_ema false: the average of a LoRA's matrices knows nothing of what is added beside them": self.use_ema,
            "torch_compile false: what is compiled has no place for what is added beside it": self.torch_compile,
        }
        for needed, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(f"nesterov = {self.nesterov} needs {needed}")

    def _check_loss(self) -> None:
        """Raises ValueError where loss, its options and what it is given do not fit each other."""
        named = ", ".join(self.loss_types)
        if self.pairing == "lists" and not self.is_list:
            raise ValueError(f"pairing lists needs a loss on lists, {', '.join(declared('list_loss'))}, not {named}")
        self.check_loss()
        if self.score_target is not None and self.replay_share:
            raise ValueError("score_target needs rewards, which the human pairs of replay_share have not")

    def _check_extragradient(self) -> None:
        """Raises ValueError where rounds cannot be repeated against other opponents."""
        wrong = {
            f"loss_type ipo, not {', '.join(self.loss_types)}": self.loss_types != ("ipo",),
            f"reference frozen, not {self.reference}": self.follows,
            "replay_share 0: human pairs have no opponents": bool(self.replay_share),
            "score_target unset: it is 1/2 of the probabilities": self.score_target is not None,
            "label_temperature unset: judge_temperature is in its place": self.label_temperature is not None,
        }
        for needed, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(f"extragradient needs {needed}")

    def _check_unused(self) -> None:
        """Raises ValueError where a setting would have no effect."""
        if self.zero_advantage == "skip":
            raise ValueError("zero_advantage skip: online-dpo leaves out prompts by min_spread and min_gap, set these")
        defaults = {name: field.default for name, field in type(self).__dataclass_fields__.items()}
        unused: dict[str, tuple[bool, str]] = {
            **dict.fromkeys(ADVANTAGES, (True, "pairs have no advantages")),
            "standardise": (len(self.scorers) < 2, "it is an ensemble's, and scorers has one"),
            "judge_temperature": (not self.extragradient, "it is extragradient's"),
            "safeguard": (self.safeguard_mu is None, "safeguard_mu is not set"),
            "draw_from": (not self.follows, "the reference is frozen: every round would be the base's"),
            "reference_decay": (self.reference != "ema", "it is reference ema's"),
            "reference_sync_steps": (self.reference != "sync", "it is reference sync's"),
            "reference_sync_alpha": (self.reference != "sync", "it is reference sync's"),
            "replay_dataset": (not self.replay_share, "replay_share is 0"),
            "replay_split": (not self.replay_share, "replay_share is 0"),
        }
        for name, (idle, why) in unused.items():
            if idle and getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} = {getattr(self, name)} has no effect: {why}")

    def check_updates(self, items: int) -> None:
        """A round lasts as many whole optimiser steps as its items fill; it must fill one."""
        used = self.own * self.gradient_accumulation_steps
        if items < used:
            raise ValueError(
                f"a round has {items} training items at most, an optimiser step takes {used} (own pairs of "
                "per_device_train_batch_size x gradient_accumulation_steps): expected at least as many"
            )

    # -- what it takes

    def calls_per_item(self) -> float:
        """Rows of the network that a training item takes, the backward pass counted twice."""
        return self.trained_rows * (3 + sum(self.network_calls().values()))

    @property
    def trained_rows(self) -> int:
        batch = self.per_device_train_batch_size  # of lists, and of human pairs
        pictures = -(-(self.own * self.members + self.replayed * 2) // batch)
        return pictures * (self.guided_rows if self.train_guided else 1)

    def network_calls(self) -> dict[str, int]:
        base = {"base": 1} if self.kl_beta and (self.follows or not self.needs_reference) else {}
        return ({"reference": 1} if self.needs_reference else {}) | base

    @property
    def copies(self) -> int:
        """Further sets of the trained weights: the reference, those of earlier rounds."""
        return int(self.follows) + (2 if self.nesterov else 0) + int(self.extragradient)

    def memory_needs(self) -> MemoryNeeds:
        needs = replace(super().memory_needs(), copies=self.copies)
        if not self.replayed:
            return needs
        return replace(needs, vae_jobs=(*needs.vae_jobs, VAEJob("encode", 2 * self.replayed)))

    def work(self) -> Work:
        work = super().work()
        own = self.own / self.per_device_train_batch_size  # only these need pictures
        drawn = {part: own * rows for part, rows in work.forward.items() if part == "rollouts"}
        vae = {kind: own * count for kind, count in work.vae.items()}
        vae |= {"encode": 2 * self.replay_share} if self.replayed else {}
        prompts = own * work.prompts + self.replay_share
        return replace(
            work,
            name="list" if self.pairing == "lists" else "pair",
            forward={**work.forward, **drawn},
            vae=vae,
            prompts=prompts,
        )

    def plan(self, world_size: int = 1) -> PlanNotes:
        notes = super().plan(world_size)
        used = self.own * self.gradient_accumulation_steps
        items, kind = self.items_per_rollout() * self.num_iterations, "lists" if self.pairing == "lists" else "pairs"
        rounds: dict[str, Any] = {
            **notes.sections["rollouts"],  # type: ignore[dict-item]
            "training items": f"at most {items:,} a round: {self.prompts_per_rollout} prompts x {self.most_pairs} "
            f"{kind} x {self.updates_per_picture} noise levels x {self.num_iterations} passes",
            "rounds": f"{-(-self.max_steps // -(-items // used)):,} of {-(-items // used):,} optimiser steps, "
            "more and shorter ones where prompts or pairs are left out",
        }
        return replace(notes, sections={**notes.sections, "rollouts": rounds})
