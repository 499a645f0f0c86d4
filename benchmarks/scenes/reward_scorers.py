"""Scorers trained on the embedded world, against what its generator knows: accuracy, calibration, speed, use.

Parts: ``accuracy`` (held-out judged pairs, beside the Bayes-optimal judge and other scorers), ``repainted`` (the same
of scenes-vp-inpaint on repainted pictures), ``throughput`` (batched against one by one), ``feedback`` (DPO on pairs
labelled by the scorer against pairs labelled by the simulated users), ``best-of-n`` (a single scorer and an ensemble
choose the best of n pictures; the oracle says what they chose), ``edit`` (held-out edits), ``pal`` (users told apart or
not, and a new one), ``facts`` (what the scorer has learnt to see), ``words`` (accuracy and facts of scenes-vp-words),
``words-feedback`` (``feedback`` with scenes-vp-words).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from diffusion_align.adapters import load_adapter
from diffusion_align.commands.demo import run_method
from diffusion_align.data import Comparisons, PairDataset, load_pairs
from diffusion_align.devices import fast_autocast
from diffusion_align.evaluation import clustered_win_rate
from diffusion_align.evaluation.accuracy import calibration_curve, expected_calibration_error, pairwise_accuracy
from diffusion_align.evaluation.compare import SamplingSettings, sample_and_score
from diffusion_align.evaluation.judging import judge
from diffusion_align.rewards import Ensemble, RewardScorer, load_scorer, score_in_batches
from diffusion_align.rewards.trained.pal import PALScorer
from diffusion_align.sampling.sampler import generate
from diffusion_align.scenes.held_out import held_out_prompts
from diffusion_align.scenes.make.comparisons import ASPECTS
from diffusion_align.scenes.make.pairs import POPULATIONS, TEMPERATURE, TIE_MARGIN, decode_jpeg, split_file
from diffusion_align.scenes.world.grammar import parse_prompt
from diffusion_align.scenes.world.oracle import score_image
from diffusion_align.training.run import train
from diffusion_align.training.settings import load_recipe

from ..harness import RESULTS, ratio_interval, read_parts, time_interleaved, write_result


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scenes-rewards", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--scorer", default="scenes-vp")
    parser.add_argument("--judged", type=Path, default=Path("runs/rewards/judged"), help="from make_comparisons judged")
    parser.add_argument("--opposed", type=Path, default=Path("runs/rewards/opposed"), help="--population opposed (pal)")
    parser.add_argument("--repainted", type=Path, default=Path("runs/rewards/repainted"), help="the same, repainted")
    parser.add_argument("--edits", type=Path, default=Path("runs/rewards/edits"), help="from make_comparisons edits")
    parser.add_argument("--members", nargs="*", default=[], help="folders of the ensemble's members (best-of-n)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the DPO runs (feedback)")
    parser.add_argument("--prompts", type=int, default=24, help="of best-of-n")
    parser.add_argument("--n", type=int, default=256, help="pictures per prompt of best-of-n")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--out", type=Path, default=RESULTS / "scenes_rewards.json")
    args = parser.parse_args(argv)
    for part in args.parts:
        measured = {"command_arguments": argv, **PARTS[part](args)}
        write_result("scenes_rewards", {**read_parts(args.out, PARTS), part: measured}, args.out)


def accuracy(args: argparse.Namespace) -> dict[str, Any]:
    """Of the scorer on judged pictures of scenes-sdxl."""
    comparisons = Comparisons(args.judged, "test")
    return accuracy_on(comparisons, args.scorer, judge(load_scorer(args.scorer), comparisons), "scenes-clip")


def repainted(args: argparse.Namespace) -> dict[str, Any]:
    """Of scenes-vp-inpaint on judged repaintings of scenes-inpaint, beside scenes-vp, which never saw any."""
    comparisons, scorer = Comparisons(args.repainted, "test"), "scenes-vp-inpaint"
    return accuracy_on(comparisons, scorer, judge(load_scorer(scorer), comparisons), "scenes-vp")


def accuracy_on(comparisons: Comparisons, scorer: str, judged: dict[str, np.ndarray], beside: str) -> dict[str, Any]:
    """Of who ``judged`` the test pairs; a quarter of them needs colour-shape pairs never seen in training."""
    bayes = np.array(comparisons.source.table["bayes_0"], float)[comparisons.rows]
    held_out = np.array([parse_prompt(comparisons[i].prompt).held_out() for i in range(len(comparisons))])
    labels = judged["overall/label"]
    decisive = labels != 0.5
    others: dict[str, np.ndarray] = {"bayes-optimal": bayes - 0.5, scorer: judged["overall"]}
    others |= {f"{scorer}, {name} only": judged[name] for name in comparisons.aspects if name in judged}
    others[beside] = judge(load_scorer(beside), comparisons)["overall"]
    rows = {}
    for name, differences in others.items():
        right = ((differences > 0) == (labels > 0.5))[decisive]
        rows[name] = {
            "accuracy": pairwise_accuracy(differences, labels),
            "standard_error": float(right.std() / len(right) ** 0.5),
            "held_out_compositions": pairwise_accuracy(differences[held_out], labels[held_out]),
        }
    probabilities = 1 / (1 + np.exp(-judged["overall"]))
    return {
        "pairs": len(labels),
        "decisive": int(decisive.sum()),
        "judges": rows,
        "share_of_bayes": rows[scorer]["accuracy"] / rows["bayes-optimal"]["accuracy"],
        "expected_calibration_error": expected_calibration_error(probabilities[decisive], labels[decisive]),
        "calibration_curve": calibration_curve(probabilities[decisive], labels[decisive]),
    }


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """How often the scorer's prompt-following head is right about pairs that differ in one kind of fact alone."""
    comparisons = Comparisons(args.judged, "test")
    return facts_of(comparisons, judge(load_scorer(args.scorer), comparisons))


def words(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy and facts of scenes-vp-words, beside scenes-vp, which does not say which words are wrong."""
    comparisons, scorer = Comparisons(args.judged, "test"), "scenes-vp-words"
    judged = judge(load_scorer(scorer), comparisons)
    return {**accuracy_on(comparisons, scorer, judged, "scenes-vp"), "facts": facts_of(comparisons, judged)}


def facts_of(comparisons: Comparisons, judged: dict[str, np.ndarray]) -> dict[str, Any]:
    """By kind of fact: test pairs that differ in it alone, and the share that the prompt-following head gets right."""
    differences = judged["prompt_following"]
    right: dict[str, list[bool]] = {}
    for i in range(len(comparisons)):
        pair = comparisons[i]
        first, second = (score_image(decode_jpeg(image), pair.prompt) for image in pair.images)
        kinds = {name.split()[-1] for name in first.facts if first.facts[name] != second.facts[name]}
        if first.prompt_following != second.prompt_following:
            better = bool((differences[i] > 0) == (first.prompt_following > second.prompt_following))
            right.setdefault(kinds.pop() if len(kinds) == 1 else "several", []).append(better)
    return {kind: {"pairs": len(hits), "right": float(np.mean(hits))} for kind, hits in sorted(right.items())}


def throughput(args: argparse.Namespace) -> dict[str, Any]:
    """256 pictures in batches of 64 against one by one."""
    scorer, images = load_scorer(args.scorer), torch.rand(256, 3, 64, 64)
    prompts = held_out_prompts(64) * 4

    def one_by_one() -> None:
        for i in range(len(images)):
            scorer.score(images[i : i + 1], prompts[i : i + 1])

    with torch.no_grad():
        seconds = time_interleaved(
            {"batched": lambda: score_in_batches(scorer, images, prompts, 64), "one by one": one_by_one}, rounds=5
        )
    return {"images_per_second_over_one_by_one": ratio_interval(seconds["one by one"], seconds["batched"])}


def feedback(args: argparse.Namespace) -> dict[str, Any]:
    """Of the scorer."""
    return feedback_of(args.scorer, args)


def words_feedback(args: argparse.Namespace) -> dict[str, Any]:
    """Of scenes-vp-words."""
    return feedback_of("scenes-vp-words", args)


def feedback_of(scorer: str, args: argparse.Namespace) -> dict[str, Any]:
    """The gain in win rate of DPO with the scorer's labels, as a share of the gain with the simulated users'."""
    relabelled = args.work / "ai-feedback"
    agreement = relabel(load_scorer(scorer), relabelled)
    prompts, oracle, settings = held_out_prompts(250), load_scorer("scenes-oracle"), SamplingSettings()
    base = sample_and_score(load_adapter("scenes-sdxl"), prompts, oracle, settings)
    assert base.reward is not None
    rates = {}
    for name, dataset in (("users", "scenes-pairs"), ("scorer", str(relabelled))):
        differences, singles = [], []
        for seed in args.seeds:
            config: Any = load_recipe(
                "scenes_dpo", seed=seed, dataset=dataset, output_dir=str(args.work / f"feedback-{name}-{seed}"),
                overwrite_output_dir=True, report_to="none", progress=False,
            )  # fmt: skip
            outcome = run_method(config, prompts, base, oracle, settings)
            assert outcome.sampled.reward is not None
            differences.append((outcome.sampled.reward.reward - base.reward.reward).tolist())
            singles.append(outcome.win_rate.rate)
            print(f"labels of {name}, seed {seed}: {outcome.win_rate}", flush=True)
        rates[name] = {"win_rate": clustered_win_rate(differences).to_json(), "per_seed": singles}
    gains = {name: rate["win_rate"]["rate"] - 0.5 for name, rate in rates.items()}
    return {"agreement_with_users": agreement, "dpo": rates, "share_of_gain": gains["scorer"] / gains["users"]}


def relabel(scorer: RewardScorer, folder: Path) -> float:
    """Write scenes-pairs' training pairs with the scorer's verdicts; returns how often they agree with the users'."""
    pairs = load_pairs("scenes-pairs", "train", keep_ties=True)
    assert isinstance(pairs, PairDataset)
    records = [pairs[i] for i in range(len(pairs))]
    with torch.no_grad():
        scores = [
            score_in_batches(scorer, [r.images()[side] for r in records], [r.caption for r in records]).reward
            for side in (0, 1)
        ]
    wins = (scores[0] > scores[1]).float().tolist()
    rows = [
        {"jpg_0": r.chosen, "jpg_1": r.rejected, "caption": r.caption, "label_0": win, "label_1": 1 - win}
        for r, win in zip(records, wins, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(split_file(folder, "train"))
    Dataset.from_list(rows[:8]).to_parquet(split_file(folder, "validation"))
    return float(np.mean([win for win, r in zip(wins, records, strict=True) if r.preference == 1]))


def best_of_n(args: argparse.Namespace) -> dict[str, Any]:
    """Mean oracle reward of what each scorer chose among n pictures, and what it promised (standardised)."""
    if not args.members:
        raise ValueError("best-of-n needs --members, the folders of the ensemble's members")
    members = [load_scorer(folder) for folder in args.members]
    ensemble = Ensemble(members, "mean", standardise="prompt")
    cautious = Ensemble(members, "mean-std", 0.5, standardise="prompt")
    judges: dict[str, RewardScorer] = {"single": members[0], "ensemble mean": ensemble, "ensemble mean-std": cautious}
    adapter, oracle = load_adapter("scenes-sdxl"), load_scorer("scenes-oracle")
    sizes = [2**k for k in range(int(np.log2(args.n)) + 1)]
    curves: dict[str, list[list[float]]] = {name: [] for name in [*judges, "oracle"]}
    promises: dict[str, list[list[float]]] = {name: [] for name in judges}
    started = time.perf_counter()
    for p, prompt in enumerate(held_out_prompts(args.prompts)):
        with fast_autocast("cpu"):
            images = generate(
                adapter, [prompt] * args.n, num_inference_steps=10, guidance_scale=3.5,
                seeds=[10_000 * p + i for i in range(args.n)], batch_size=64,
            )  # fmt: skip
        truth = oracle.score(images, [prompt] * args.n).reward.numpy()
        curves["oracle"].append([float(truth[:n].max()) for n in sizes])
        for name, scorer in judges.items():
            with torch.no_grad():
                proxy = scorer.score(images, [prompt] * args.n).reward.numpy()
            standard = (proxy - proxy.mean()) / max(float(proxy.std()), 1e-6)
            best = [int(proxy[:n].argmax()) for n in sizes]
            curves[name].append([float(truth[i]) for i in best])
            promises[name].append([float(standard[i]) for i in best])
        print(f"prompt {p + 1} of {args.prompts}, {time.perf_counter() - started:.0f} s", flush=True)
    return {
        "prompts": args.prompts,
        "n": sizes,
        "oracle_reward": {name: _mean_and_error(values) for name, values in curves.items()},
        "proxy_reward": {name: _mean_and_error(values) for name, values in promises.items()},
    }


def _mean_and_error(values: list[list[float]]) -> dict[str, list[float]]:
    table = np.array(values)
    return {"mean": table.mean(axis=0).tolist(), "standard_error": (table.std(axis=0) / len(table) ** 0.5).tolist()}


def edit(args: argparse.Namespace) -> dict[str, Any]:
    """scenes-edit on held-out edits: which attempt is better."""
    judged = judge(load_scorer("scenes-edit"), Comparisons(args.edits, "test"))
    rows = {}
    for name in (key for key in judged if not key.endswith("/label")):
        labels = judged[f"{name}/label"]
        decisive = labels != 0.5
        rows[name] = {"pairs": int(decisive.sum()), "accuracy": pairwise_accuracy(judged[name], labels)}
    labels, probabilities = judged["overall/label"], 1 / (1 + np.exp(-judged["overall"]))
    return {
        "judgements": rows,
        "expected_calibration_error": expected_calibration_error(probabilities, labels),
        "calibration_curve": calibration_curve(probabilities, labels),
    }


#: Weights of (prompt_following, aesthetic, fidelity) of a user who was not among those that scenes-pal was trained on.
NEWCOMER = (0.0, 1.0, 0.0)


def pal(args: argparse.Namespace) -> dict[str, Any]:
    """scenes-pal told who judges, against the same model trained as if all were one user; and a new user."""
    comparisons = Comparisons(args.opposed, "test")
    scorer = load_scorer("scenes-pal")
    single = one_user_model(args.opposed, args.work)
    judged, lumped = judge(scorer, comparisons), judge(single, as_one_user(args.opposed, "test", args.work))
    labels = judged["overall/label"]
    users = np.array([comparisons[i].user for i in range(len(comparisons))])
    accuracies = {
        name: {"pal": pairwise_accuracy(judged["overall"][rows], labels[rows]),
               "one user": pairwise_accuracy(lumped["overall"][rows], labels[rows])}
        for name, rows in {"all": users != "", **{user: users == user for user in sorted(set(users))}}.items()
    }  # fmt: skip
    decisive = labels != 0.5
    hits = [((side["overall"] > 0) == (labels > 0.5))[decisive].astype(float) for side in (judged, lumped)]
    gap = hits[0] - hits[1]
    return {
        "accuracy": accuracies,
        "perfect_judge": room_for_users(comparisons),
        "gain": {"mean": float(gap.mean()), "standard_error": float(gap.std() / len(gap) ** 0.5)},
        "new_user": new_user(scorer, comparisons),
    }


def room_for_users(comparisons: Comparisons) -> dict[str, dict[str, float]]:
    """Expected accuracy on decisive verdicts of a perfect judge who knows who is asking and of one who does not."""
    scores = []
    for record in (comparisons[i] for i in range(len(comparisons))):
        scores.append([score_image(decode_jpeg(file), record.prompt) for file in record.images])
    found = {}
    for name, users in POPULATIONS.items():
        utility = np.array([[u.utility(first) - u.utility(second) for u in users.values()] for first, second in scores])
        decisive = np.array([user.share for user in users.values()]) * (np.abs(utility) >= TIE_MARGIN)
        first = decisive / (1 + np.exp(-utility / TEMPERATURE))
        knowing = np.maximum(first, decisive - first).sum() / decisive.sum()
        blind = np.maximum(first.sum(axis=1), (decisive - first).sum(axis=1)).sum() / decisive.sum()
        found[name] = {"knowing the user": float(knowing), "not knowing": float(blind)}
    return found


def as_one_user(judged: Path, split: str, work: Path) -> Comparisons:
    """The judged pairs of a split, all signed by the same user."""
    folder = work / "one-user"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "validation", "test"):
        file = split_file(folder, name)
        if not file.is_file():
            rows = Dataset.from_parquet(str(split_file(judged, name)))
            rows.remove_columns("user_id").add_column("user_id", ["everyone"] * len(rows)).to_parquet(file)
    return Comparisons(folder, split)


def one_user_model(judged: Path, work: Path) -> RewardScorer:
    """scenes-pal's recipe without telling users apart."""
    as_one_user(judged, "train", work)
    config = load_recipe(
        "scenes_pal", dataset=str(work / "one-user"), output_dir=str(work / "pal-one-user"), overwrite_output_dir=True,
        progress=False, eval_steps=0,
    )  # fmt: skip
    weights = train(config).weights
    assert weights is not None
    return load_scorer(str(weights))


def new_user(scorer: RewardScorer, comparisons: Comparisons, shown: int = 20, draws: int = 10) -> dict[str, Any]:
    """Accuracy for a new taste before (the mean of the known users) and after ``shown`` comparisons."""
    assert isinstance(scorer, PALScorer)
    records = [comparisons[i] for i in range(0, len(comparisons), 3)]
    pictures = [[decode_jpeg(file) for file in r.images] for r in records]
    likes = np.array(
        [
            [sum(w * getattr(s, a) for w, a in zip(NEWCOMER, ASPECTS, strict=True))
             for s in (score_image(picture, r.prompt) for picture in pair)]
            for r, pair in zip(records, pictures, strict=True)
        ]
    )  # fmt: skip
    images = torch.from_numpy(np.array(pictures)).permute(1, 0, 4, 2, 3).float() / 255  # (2, N, 3, H, W)
    prompts, truth = [r.prompt for r in records], torch.from_numpy((likes[:, 0] > likes[:, 1]).astype(np.float32))
    centre = {"mixture": scorer.head.mixture.data.mean(dim=0, keepdim=True)}
    found: dict[str, list[float]] = {"before": [], "after": []}
    rng = np.random.default_rng(0)
    for draw in range(draws):
        rows = rng.permutation(len(records))
        few, rest = rows[:shown], rows[shown:]
        for name in found:
            user = f"newcomer {draw} {name}"
            if name == "after":
                scorer.add_user(user, images[0][few], images[1][few], [prompts[i] for i in few], truth[few])
            else:
                scorer.users.append(user)
                scorer.head.mixture = torch.nn.Parameter(
                    torch.cat([scorer.head.mixture.data, centre["mixture"]]), requires_grad=False
                )
            asked = [prompts[i] for i in rest]
            with torch.no_grad():
                sides = [score_in_batches(scorer, side[rest], asked, 64, users=[user] * len(rest)) for side in images]
            right = (sides[0].reward > sides[1].reward) == (truth[rest] > 0.5)
            found[name].append(float(right.float().mean()))
    gain = np.array(found["after"]) - np.array(found["before"])
    return {
        "comparisons": shown,
        "before": float(np.mean(found["before"])),
        "after": float(np.mean(found["after"])),
        "gain": {"mean": float(gain.mean()), "standard_error": float(gain.std() / draws**0.5), "draws": draws},
    }


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "accuracy": accuracy,
    "repainted": repainted,
    "throughput": throughput,
    "feedback": feedback,
    "best-of-n": best_of_n,
    "edit": edit,
    "pal": pal,
    "facts": facts,
    "words": words,
    "words-feedback": words_feedback,
}
