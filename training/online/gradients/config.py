"""Settings of reward gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from diffusion_align.training.engine.config import Fraction, NonNegativeFloat, Positive
from diffusion_align.training.policy.config import MemoryNeeds, VAEJob, Work
from diffusion_align.training.policy.flow_times import changed

from ..config import OnlineConfig

#: Settings of direct_align, and those of DRaFT's own steps, which it does not take.
OF_DIRECT_ALIGN = (
    "align_times", "align_step", "align_guidance", "positive_words", "negative_words", "discount", "inverse_discount",
)  # fmt: skip
OF_LAST_STEPS = ("gradient_steps", "lv_repeats", "random_last_step", "last_time")


@dataclass(frozen=True, kw_only=True)
class DRaFTConfig(OnlineConfig):
    """Reward gradients through the last sampling steps and the VAE (DRaFT 2309.17400, AlignProp, ReFL 2304.05977)."""

    method: ClassVar[str] = "draft"
    guidance_settings: ClassVar[tuple[str, ...]] = (*OnlineConfig.guidance_settings, "align_guidance")

    gradient_steps: Positive = 1
    """Last sampling steps that the gradient goes through (DRaFT-K)."""
    lv_repeats: Positive = 1
    """With gradient_steps 1: average over this many re-noised copies of the last step (DRaFT-LV)."""
    last_time: Fraction | None = None
    """Flow models: the picture is predicted from the last step whose time is at least this; unset: 0.1."""
    random_last_step: bool = False
    """ReFL: predict the picture from a random late step instead of finishing the sampling."""
    reward_loss: Literal["linear", "hinge"] = "linear"
    """Minus the reward, or ReFL's max(0, reward_margin - reward)."""
    reward_margin: float = 2.0
    """Margin of the hinge."""
    kl_beta: NonNegativeFloat = 0.0
    """Weight of the squared distance to the reference's predictions in the differentiated steps."""

    # -- Direct-Align
    direct_align: bool = False
    """Flow models: finish the pictures without a graph, and learn from one step between two random times of each, with
    the noise that it was drawn from, which is taken out again (Direct-Align, SRPO 2509.06942)."""
    align_times: tuple[Fraction, Fraction] = (0.75, 0.96)
    """direct_align: least and largest time of that step; above 0.99 layouts break, low ones teach colours."""
    align_step: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """direct_align: length of the step, as a share of that range."""
    align_guidance: NonNegativeFloat | None = None
    """direct_align: guidance scale of the step that is trained (SRPO 3.5, with guidance_scale 1 for drawing); unset:
    guidance_scale."""
    positive_words: tuple[str, ...] = ()
    """direct_align: words that are put before the prompt, for the scorer alone; each picture gets one of them. With
    negative_words the reward is (1 + k) r(positive) - r(negative), and a second step, to more noise, is rewarded the
    other way round (SRPO)."""
    negative_words: tuple[str, ...] = ()
    """direct_align: words of what pictures shall not look like."""
    discount: tuple[NonNegativeFloat, NonNegativeFloat] = (0.1, 0.25)
    """direct_align with words: k at the least and at the largest of align_times."""
    inverse_discount: tuple[NonNegativeFloat, NonNegativeFloat] = (0.3, 0.01)
    """direct_align with words: the same of the step to more noise."""

    @property
    def branches(self) -> int:
        """Steps of a picture that direct_align learns from."""
        return 2 if self.positive_words else 1

    @property
    def copies(self) -> int:
        """Pictures that are decoded with a graph, for each that is drawn."""
        return self.branches if self.direct_align else self.lv_repeats

    @property
    def trained_guidance(self) -> float:
        """Guidance scale of the predictions that are trained."""
        return self.guidance_scale if self.align_guidance is None else self.align_guidance

    @property
    def trained_rows(self) -> int:
        """Rows of the network for one prediction that is trained."""
        return 2 if self.trained_guidance > 1 else 1

    def check(self) -> None:
        super().check()
        if self.direct_align:
            self._check_align()
        elif unused := changed(self, OF_DIRECT_ALIGN):
            raise ValueError(f"{unused[0]} is for direct_align, which is not set")
        if self.gradient_steps > self.num_inference_steps:
            raise ValueError(
                f"gradient_steps = {self.gradient_steps}: there are {self.num_inference_steps} sampling steps"
            )
        if self.lv_repeats > 1 and (self.gradient_steps > 1 or self.random_last_step):
            raise ValueError("lv_repeats re-noises the last step: it needs gradient_steps 1 and random_last_step false")

    def _check_align(self) -> None:
        if unused := changed(self, OF_LAST_STEPS):
            raise ValueError(f"{unused[0]} has no effect with direct_align, which learns from a step of its own")
        low, high = self.align_times
        if not 0 < low < high < 1:
            raise ValueError(f"align_times = {low:g} {high:g}: expected times between 0 and 1, the smaller one first")
        if bool(self.positive_words) != bool(self.negative_words):
            raise ValueError("positive_words and negative_words are compared with each other: give both, or neither")
        if not self.positive_words and (unused := changed(self, ("discount", "inverse_discount"))):
            raise ValueError(f"{unused[0]} is for positive_words and negative_words, which are not set")

    def memory_needs(self) -> MemoryNeeds:
        decoding = VAEJob("decode_with_graph", self.per_device_train_batch_size * self.copies)
        passes, rows = self.gradient_steps * self.copies, self.trained_rows
        return MemoryNeeds(self.resolution, rows=rows, passes=passes, vae_jobs=(decoding,), vae_in_backward=True)

    def work(self) -> Work:
        trained = self.gradient_steps * self.copies
        steps = float(self.num_inference_steps)
        if self.random_last_step:  # any of the last third
            steps -= (max(self.num_inference_steps // 3, 1) - 1) / 2
        drawn = steps
        if not self.direct_align:
            drawn += -self.gradient_steps + (1 if self.lv_repeats > 1 else 0)
        reference = {"reference": trained * self.trained_rows} if self.kl_beta else {}
        return Work(
            "picture",
            trained=trained * self.trained_rows,
            forward={"drawing": drawn * self.guided_rows, **reference},
            vae={"decode_with_graph": self.copies},
        )
