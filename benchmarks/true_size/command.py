"""A model of true size, used as a user would: from a folder, from fp16 files only, from a single file.

``--folder`` is a pipeline of SD 1.x or SDXL, published or with random weights: what is looked at does not depend on the
weights. Part ``use``: ``generate``, ``train dpo`` for one step with the model's recipe, ``export`` in three formats;
the picture from the merged pipeline beside that with the LoRA loaded; with ``--comfyui`` the names of the LoRA that
ComfyUI finds. Part ``memory``: training runs, measured and as ``--dry-run`` estimates them.

Measured is the peak of what a process allocated, less what Python and the libraries take before a model is loaded.
Pages of mapped weight files, which the system can drop, are only in the resident peak. In part ``memory`` the C library
must give back what is freed, which runs on a CPU else keep for speed:
``MALLOC_MMAP_THRESHOLD_=1000000 python -m benchmarks true-size --part memory ...``. All runs are on the CPU, in
float32; Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ..harness import RESULTS, write_result
from . import memory_runs
from .sources import LAYOUTS, laid_out, write_pairs
from .use import Uses
from .watched import before_any_model, in_gib

PARTS = ("use", "memory")
RECIPES = Path(__file__).parents[2] / "training" / "recipes"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks true-size", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="pipeline folder")
    parser.add_argument("--model-name", choices=("sd15", "sdxl"), required=True, help="whose recipe, and whose rows")
    parser.add_argument("--part", choices=PARTS, default="use")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="use: of the weights")
    parser.add_argument("--runs", nargs="+", default=list(memory_runs.RUNS), help="memory: which")
    parser.add_argument("--resolution", type=int, default=64, help="use: of training and drawing")
    parser.add_argument("--comfyui", type=Path, help="use: ComfyUI's folder")
    parser.add_argument("--merged-dtype", choices=("fp32", "fp16"), default="fp32", help="use: of the merged pipeline")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/true-size"))
    parser.add_argument("--out", type=Path, default=RESULTS / "true_size.json")
    args = parser.parse_args(argv)
    if args.part == "memory" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        parser.error("--part memory needs MALLOC_MMAP_THRESHOLD_=1000000 in the environment")
    pairs, before = write_pairs(args.work / "pairs"), before_any_model()
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {}
    result = {part: result.get(part, {}) for part in PARTS} | {"process_before_model_gib": in_gib(before)}
    rows = result[args.part].setdefault(args.model_name, {})
    if args.part == "use":
        recipe = RECIPES / args.model_name / f"{args.model_name}_dpo_pickapic.yaml"
        settings = args.resolution, args.comfyui, args.merged_dtype, before, args.threads
        uses = Uses(args.folder, recipe, pairs, args.work, *settings)
        for layout in args.layouts:
            rows[layout] = uses.row(layout)
            write_result("true_size", result, args.out)
        return
    with laid_out(args.folder, "folder", args.work) as model:
        for name in args.runs:
            rows[name] = memory_runs.measure(name, model, pairs, args.work, before, args.threads)
            write_result("true_size", result, args.out)
