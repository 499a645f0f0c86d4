"""Streaming at the size of Pick-a-Pic: start, resume, order and waiting, on a made data set of many parquet files.

Every figure is of a process of its own, as a user starts it. The pictures are tiny; rows, verdicts and captions are as
many as there would be.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy import stats

from diffusion_align.data import PairTransform, StreamedPairs, StreamLoader, load_pairs
from diffusion_align.training.engine.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from diffusion_align.training.pairs.config import DPOConfig

from .harness import write_result

#: Rows that the order is tested on: what the recipes of SDXL see.
SEEN = 128_000
#: Tells of its own CPU time and memory; runs one command line of the product.
CHILD = (
    "import resource, sys, time; from diffusion_align.cli import main; "
    "code = main(sys.argv[1:]); peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
    "print(f'\\n{time.process_time():.2f} {peak / 2**20:.3f}', file=sys.stderr); sys.exit(code)"
)


def pictures(count: int, side: int, seed: int = 0) -> list[bytes]:
    """Small JPEG files, each different."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        picture = np.full((side, side, 3), rng.integers(256, size=3), dtype=np.uint8)
        top, left = rng.integers(side // 2, size=2)
        picture[top : top + side // 2, left : left + side // 2] = rng.integers(256, size=3)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="JPEG", quality=60, optimize=True)
        found.append(buffer.getvalue())
    return found


def make(folder: Path, rows: int, shards: int, side: int, seed: int = 0) -> None:
    """Files of unequal size with row groups of 100 rows, of 1,000, or of a whole file, in turn; 1 row in 8 is a tie."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, rows), shards - 1, replace=False))
    sizes = np.diff([0, *cuts, rows])
    content, first = pictures(512, side), 0
    for number, size in enumerate(sizes.tolist()):
        draws = rng.integers(len(content), size=(2, size))
        label = rng.choice([0.0, 0.5, 1.0], p=[0.4375, 0.125, 0.4375], size=size)
        table = pa.table(
            {
                "jpg_0": pa.array([content[i] for i in draws[0]], pa.binary()),
                "jpg_1": pa.array([content[i] for i in draws[1]], pa.binary()),
                "caption": [f"a picture of row {first + i}" for i in range(size)],
                "label_0": label,
                "label_1": 1 - label,
            }
        )
        name = f"train-{number:05d}-of-{shards:05d}.parquet"
        pq.write_table(
            table, folder / name, row_group_size=(100, 1000, size)[number % 3], use_dictionary=False, compression="none"
        )
        first += size


def product(out: Path, *arguments: str) -> dict[str, float]:
    """Of one training with one step in ``out``: seconds from before the first import to the end of the step; CPU
    seconds and peak GiB of the whole process, with its checkpoint."""
    arguments = ("train", "dpo", "--output-dir", str(out), "--report-to", "none", "--logging-steps", "1", *arguments)
    started = time.time()
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}:\n{done.stderr[-2000:]}")
    seconds, (cpu, peak) = (out / "metrics.jsonl").stat().st_mtime - started, map(float, done.stderr.split()[-2:])
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "peak_gib": round(peak, 2)}


def streamed(folder: Path, **options: Any) -> StreamedPairs:
    pairs = load_pairs(folder, streaming=True, **options)
    assert isinstance(pairs, StreamedPairs)
    return pairs


def numbers(keys: list[str]) -> list[int]:
    return [int(key.removeprefix("row ")) for key in keys]


def run_and_resume(folder: Path, work: Path, at: int) -> dict[str, Any]:
    """One step from the start, one from row ``at``, and one of the shipped pairs, which are a thousand; with imports,
    model and data."""
    out, batch = work / "run", DPOConfig().per_device_train_batch_size
    recipe = ["--dataset", str(folder), "--streaming"]
    few = product(work / "few", "--max-steps", "1", "--overwrite-output-dir")
    first = product(out, *recipe, "--max-steps", "1", "--overwrite-output-dir")
    checkpoint, _ = find_checkpoint("latest", out)
    state = load_checkpoint(checkpoint)
    loader = StreamLoader(streamed(folder), PairTransform(64), batch, seed=DPOConfig().seed)
    loader.load_state_dict({"epoch": 0, "used": at, "read": at})
    next(iter(loader))  # a position as the product writes it, in the middle of a block
    state.values["method"] = loader.state_dict()
    save_checkpoint(out, state, 1, keep=1)
    second = product(out, *recipe, "--max-steps", "2", "--resume-from-checkpoint", "latest")
    return {"one step of the shipped pairs": few, "one step": first, f"one step from row {at:,}": second}


def whole_epoch(folder: Path, processes: int, batch: int) -> dict[str, Any]:
    """Every row that each of some processes gets in an epoch, and whether one that is resumed in it goes on with the
    rows that were to come."""
    pairs, seen, resumed = streamed(folder), [], []
    for rank in range(processes):
        options: dict[str, Any] = {"rank": rank, "world_size": processes, "seed": 1}
        loader = StreamLoader(pairs, PairTransform(8), batch, **options)
        rows, at = loader.epoch(0), int(0.7 * len(pairs.shards)) // processes
        loader.load_state_dict({"epoch": 0, "used": at, "read": at})
        next(iter(loader))
        position = json.loads(json.dumps(loader.state_dict()))
        again = StreamLoader(pairs, PairTransform(8), batch, **options)
        again.load_state_dict(position)
        read = [row for found in islice(again, 20) for row in numbers(found.keys)]
        resumed.append(read == rows[at + batch : at + 21 * batch].tolist())
        seen.append(rows)
    together = np.unique(np.concatenate(seen))
    return {
        "processes": processes,
        "usable pairs": pairs.used,
        "pairs of each": [len(rows) for rows in seen],
        "pairs of more than one": sum(map(len, seen)) - len(together),
        "pairs of none, left to the next epoch": (pairs.used or 0) - len(together),
        "resumed at 70% with the rows to come": resumed,
    }


def order(folder: Path, seeds: int) -> dict[str, Any]:
    """Tests that the rows seen first are spread over the data set like random ones; p-values, one for each seed."""
    pairs = streamed(folder)
    usable = pairs.rows_of(pairs.selected.tolist())
    rank_of = np.zeros(len(pairs.shards), dtype=np.int64)
    rank_of[usable] = np.arange(len(usable))
    files = np.array([pairs.shards.groups[pairs.shards.group_of(row)].file for row in usable.tolist()])
    expected = np.bincount(files) / len(usable)
    found: dict[str, list[float]] = {"kolmogorov-smirnov": [], "chi-square over files": [], "serial correlation": []}
    for seed in range(seeds):
        loader = StreamLoader(pairs, PairTransform(8), 1, seed=seed)
        places = rank_of[loader.epoch(0)[:SEEN]]
        found["kolmogorov-smirnov"].append(stats.kstest((places + 0.5) / len(usable), "uniform").pvalue)
        counts = np.bincount(files[places], minlength=len(expected))
        found["chi-square over files"].append(stats.chisquare(counts, expected * len(places)).pvalue)
        found["serial correlation"].append(stats.pearsonr(places[:-1], places[1:]).pvalue)
    return {"rows": SEEN, **{name: [round(float(p), 4) for p in values] for name, values in found.items()}}


WAITING = """
import json, sys, time
from diffusion_align.data import StreamLoader
from diffusion_align import DPOConfig, train
plain, waited, ended = StreamLoader.__iter__, [], []
def timed(self):
    batches = plain(self)
    while True:
        started = time.perf_counter(); batch = next(batches); ended.append(time.perf_counter())
        waited.append(ended[-1] - started); yield batch
StreamLoader.__iter__ = timed
folder, out, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
train(DPOConfig(dataset=folder, streaming=True, max_steps=steps, output_dir=out, report_to="none", progress=False,
                overwrite_output_dir=True))
print("waited", json.dumps({"steps": steps - 1, "share": sum(waited[1:]) / (ended[-1] - ended[0])}))
"""


def waiting(folder: Path, work: Path, steps: int) -> dict[str, Any]:
    """The share of the step in which it waits for its batch, after the first one; scenes-sdxl at 64 px."""
    command = [sys.executable, "-c", WAITING, str(folder), str(work / "waiting"), str(steps)]
    done = subprocess.run(command, text=True, capture_output=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("waited"))
    return {"cores": os.cpu_count(), **json.loads(line.removeprefix("waited"))}


def large_pictures(work: Path, side: int = 1024, count: int = 64) -> dict[str, Any]:
    """Milliseconds of CPU to read and decode one pair of ``side`` px, and cards that one core keeps busy."""
    folder = work / "large"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(256, size=(side // 8, side // 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=90)
    row = {"jpg_0": buffer.getvalue(), "jpg_1": buffer.getvalue(), "caption": "x", "label_0": 1.0}
    pq.write_table(pa.Table.from_pylist([row] * count), folder / "train-00000-of-00001.parquet", row_group_size=16)
    loader = StreamLoader(streamed(folder), PairTransform(side), 8)
    started = time.process_time()
    pairs = sum(len(batch) for batch in islice(loader, count // 8))
    seconds = (time.process_time() - started) / pairs
    step = 64 / 350  # TFLOP of DPO with a LoRA a pair, at 350 TFLOP/s: an H100's bf16
    return {
        "bytes a picture": len(buffer.getvalue()),
        "CPU milliseconds a pair": round(1000 * seconds, 1),
        "card milliseconds a pair (64 TFLOP at 350 TFLOP/s)": round(1000 * step, 1),
        "cores that one card needs": round(seconds / step, 2),
    }


def main(arguments: list[str]) -> None:
    """Make the data set if it is not there, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks shards", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--side", type=int, default=32, help="of the pictures in px")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5, help="for the tests of the order")
    parser.add_argument("--steps", type=int, default=60, help="for the waiting")
    parser.add_argument("--folder", type=Path, default=Path("runs/shards"), help="where the data set is made, or is")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(arguments)
    folder = options.folder / f"{options.rows}-{options.shards}-{options.side}"
    if not folder.is_dir():
        make(folder, options.rows, options.shards, options.side)
    size = sum(file.stat().st_size for file in folder.iterdir())
    result = {
        "other work on the machine: load average": round(os.getloadavg()[0], 1),
        "data": {"rows": options.rows, "files": options.shards, "picture px": options.side, "bytes": size},
        "start": run_and_resume(folder, options.folder, int(0.7 * options.rows)),
        "waiting": waiting(folder, options.folder, options.steps),
        "order": order(folder, options.seeds),
        "large pictures": large_pictures(options.folder),
        "epoch": whole_epoch(folder, options.processes, batch=50),
    }
    write_result("shards", result, options.out)
