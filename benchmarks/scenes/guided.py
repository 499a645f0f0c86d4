"""Ways to guide on the embedded world: what ``diffusion-align evaluate guidance`` measures, and what a step costs.

Parts: ``table`` (win rates over the best static scale, effective scales, win rates over static guidance at those),
``uneven`` (the same of scenes-uneven, whose prompts want different scales), ``contrastive`` (a DPO model guided away
from one that was trained on exchanged preferences, both trained here unless they are there), ``flow`` (of scenes-flow,
by an evaluator of the recipe scenes_flow_evaluator, whose data and training are made unless they are there),
``overhead`` (dynamic guidance's time over static guidance's), ``flops`` (what it adds to a step of SDXL, counted).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from diffusion_align import load_recipe, train
from diffusion_align.adapters import Conditioning, load_adapter
from diffusion_align.adapters.lora_files import LORA_FILE
from diffusion_align.commands.evaluate_guidance import guidance_table
from diffusion_align.commands.guiding.guidance_options import EvaluateGuidanceOptions, RowGroup
from diffusion_align.devices import fast_autocast
from diffusion_align.evaluation.guidance_rows import slopes
from diffusion_align.guidance.dynamic import DynamicGuidance
from diffusion_align.guidance.judges.evaluator import EvaluatorSettings, LatentEvaluator, load_evaluator
from diffusion_align.sampling.control import SamplingOptions
from diffusion_align.sampling.sampler import sample
from diffusion_align.scenes.held_out import held_out_prompts
from diffusion_align.scenes.make import comparisons
from diffusion_align.scenes.make.pairs import split_file

from ..harness import RESULTS, ratio_interval, read_parts, time_interleaved, write_result
from ..sdxl import UNET

GROUPS: tuple[str, ...] = get_args(RowGroup)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scenes-guidance", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--ways", nargs="*", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--matched", type=int, default=32, help="prompts that effective scales are measured on")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions")
    parser.add_argument("--fit-rollouts", type=int, default=8, help="a prompt, for the learned schedule; 0: none")
    parser.add_argument("--train-steps", type=int, default=None, help="of contrastive's models; the recipe's if unset")
    parser.add_argument("--work", type=Path, default=Path("runs/scenes-guidance"), help="schedules and trained models")
    parser.add_argument("--static", type=float, default=None, help="best static scale, if known: no sweep")
    parser.add_argument("--selector", default=None, help="scorer of the best-of-2 row, e.g. scenes-vp")
    parser.add_argument("--rounds", type=int, default=10, help="of the timing")
    parser.add_argument("--out", type=Path, default=RESULTS / "scenes_guidance.json")
    args = parser.parse_args(argv)
    for part in args.parts:
        measured = {"command_arguments": argv, **PARTS[part](args)}
        write_result("scenes_guidance", {**read_parts(args.out, KEPT), part: measured}, args.out)


#: Settings of scenes-uneven's table: its scales lie further apart.
UNEVEN: dict[str, Any] = {
    "model": "scenes-uneven",
    "evaluator": "scenes-uneven-evaluator",
    "evaluators": ("value",),
    "candidates": (1.0, 1.5, 2.5, 3.5, 5.0),
    "sweep": (1.0, 1.5, 2.0, 2.5, 3.5, 5.0),
    "num_inference_steps": 10,
}

#: What its evaluator learns from, as the recipe says.
FLOW_PAIRS = ("--model", "scenes-flow", "--scales", "3.5", "5.5", "8", "--train", "1500", "--held-out", "60", "--seed",
              "71", "--spare-fresh")  # fmt: skip
#: Settings of scenes-flow's table: it wants larger scales.
FLOW: dict[str, Any] = {
    "model": "scenes-flow",
    "evaluators": ("preference",),
    "candidates": (3.5, 4.5, 5.5, 7.0, 8.5),
    "sweep": (2.0, 3.5, 5.5, 7.0, 8.5, 10.0),
}


def table(args: argparse.Namespace) -> dict[str, Any]:
    """The comparison with the shipped evaluator and the defaults."""
    return measured_table(args, "table", {})


def uneven(args: argparse.Namespace) -> dict[str, Any]:
    """The comparison on scenes-uneven."""
    return measured_table(args, "uneven", UNEVEN)


def flow(args: argparse.Namespace) -> dict[str, Any]:
    """The comparison on scenes-flow, whose evaluator does not come with the package."""
    run, pairs = args.work / "flow-evaluator", args.work / "flow-pairs"
    evaluator = run / "evaluator"
    if not evaluator.is_dir():
        if not split_file(pairs, "test").is_file():
            comparisons.main(["judged", str(pairs), *FLOW_PAIRS])
        train(load_recipe("scenes_flow_evaluator", dataset=str(pairs), output_dir=str(run)))
    return measured_table(args, "flow", {**FLOW, "evaluator": str(evaluator)})


def contrastive(args: argparse.Namespace) -> dict[str, Any]:
    """The comparison on a DPO model, with its negative model in the null branch and both merged."""
    folders = [trained(args, name, swap) for name, swap in (("dpo", False), ("npo", True))]
    settings = {"lora": (str(folders[0]),), "negative_lora": (str(folders[1]),)}
    few = argparse.Namespace(**{**vars(args), "ways": ["curve"], "fit_rollouts": 0, "selector": None})
    return measured_table(few, "contrastive", settings)


def trained(args: argparse.Namespace, name: str, swap: bool) -> Path:
    """Folder of a finished run of the recipe scenes_dpo, trained now if it is not there."""
    out: Path = args.work / name
    config = replace(load_recipe("scenes_dpo"), output_dir=str(out), swap_labels=swap, report_to="none")
    config = config if args.train_steps is None else replace(config, max_steps=args.train_steps)
    if not (out / LORA_FILE).is_file():
        train(config)
    return out


def measured_table(args: argparse.Namespace, part: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A guidance table, written after each row: it takes an hour.

    Rows measured earlier for the same static scale are kept, so that ``--ways`` may be measured one at a time.
    """
    options = EvaluateGuidanceOptions(
        num_prompts=args.prompts, num_validation_prompts=max(1, args.prompts // 2), selector=args.selector,
        ways=tuple(args.ways), static=args.static, matched_prompts=args.matched,
        seeds=tuple(1_000_000 * i for i in range(args.seeds)), fit_rollouts=max(2, args.fit_rollouts),
        fit=str(args.work / f"annealing-{part}.json") if args.fit_rollouts else None, **settings,
    )  # fmt: skip

    def joined(found: dict[str, Any]) -> dict[str, Any]:
        earlier = read_parts(args.out, KEPT).get(part, {})
        if earlier.get("best_static") != found["best_static"]:
            return found
        sweep = found["sweep_on_validation"] or earlier["sweep_on_validation"]
        rows = {**earlier["rows"], **found["rows"]}
        return {**found, "sweep_on_validation": sweep, "rows": rows, "curve": slopes(rows, options.sweep)}

    def keep(found: dict[str, Any]) -> None:
        write_result("scenes_guidance", {**read_parts(args.out, KEPT), part: joined(found)}, args.out)

    return joined(guidance_table(options, keep))


def overhead(args: argparse.Namespace) -> dict[str, Any]:
    """Sampling time of dynamic guidance (5 scales, 3 evaluators) over static guidance, whole pictures, one run."""
    adapter, prompts = load_adapter("scenes-sdxl"), held_out_prompts(32)
    guider = DynamicGuidance(kinds=("alignment", "fidelity", "preference"), candidates=(2.0, 2.5, 3.5, 5.0, 6.0))
    guider.use(load_evaluator("scenes-sdxl-evaluator"))
    together = SamplingOptions(batch_size=32)

    def draw(guidance: Any) -> Callable[[], Any]:
        def run() -> None:
            with fast_autocast("cpu"):
                sample(adapter, prompts, num_inference_steps=10, guidance=guidance, seeds=range(32), options=together)

        return run

    seconds = time_interleaved({"static": draw(5.0), "dynamic": draw(guider)}, rounds=args.rounds)
    return {"dynamic_over_static": ratio_interval(seconds["dynamic"], seconds["static"])}


def flops(args: argparse.Namespace) -> dict[str, Any]:
    """Floating-point operations that judging 5 scales by 3 kinds adds to a guided step of SDXL at 1024 pixels.

    Counted on tensors without data. The prompt is read once, in the first step, by which all is charged here.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
        evaluator = LatentEvaluator(EvaluatorSettings(4, 128, 2048, 1280))
        both = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
        with torch.no_grad(), FlopCounterMode(display=False) as step:
            unet(torch.empty(2, 4, 128, 128), torch.empty(2), torch.empty(2, 77, 2048), added_cond_kwargs=both)
        candidates, level = torch.empty(5, 4, 128, 128), torch.empty(5)
        with torch.no_grad(), FlopCounterMode(display=False) as judging:
            text = evaluator.text(Conditioning(torch.empty(1, 77, 2048), torch.empty(1, 1280)))
            evaluator.judge(candidates, level, (text.expand(5, -1),), level)
    added, guided = judging.get_total_flops(), step.get_total_flops()
    return {"guided_step": guided, "judging": added, "judging_over_guided_step": added / guided}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "overhead": overhead,
    "flops": flops,
    "table": table,
    "uneven": uneven,
    "contrastive": contrastive,
    "flow": flow,
}
#: ``earlier`` are tables of a version without effective scales and bounds, on 500 prompts and 3 seeds.
KEPT = (*PARTS, "earlier")
