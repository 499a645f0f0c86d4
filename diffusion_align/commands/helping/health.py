"""What ``doctor`` looks at: small questions about this machine, each with what to do if the answer is bad."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Literal

from diffusion_align.environment import git_commit, versions

GIB = 2**30
#: Disk below which a run of SDXL's size would not get far.
LITTLE_DISK = 20 * GIB
#: Milliseconds of a synced write above which journals and labels become slow.
SLOW_FSYNC = 50.0
#: Models of the cache that are named.
MOST_MODELS = 8
#: Optional packages, and the extra that brings each.
OPTIONAL = {
    "xformers": "xformers", "bitsandbytes": "bnb", "wandb": "wandb", "starlette": "studio", "ipywidgets": "notebooks",
}  # fmt: skip
FLAGS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
#: What must not be pasted anywhere.
SECRET = re.compile(r"\b(?:hf|sk|ghp|github_pat|wandb)[-_][A-Za-z0-9_-]{8,}")


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        fix: what to do; "" where nothing is wrong.
    """

    name: str
    state: Literal["ok", "warn", "fail"]
    text: str
    fix: str = ""


def pasteable(text: str) -> str:
    """A text without the home folder, the user's name and anything that looks like a token."""
    home = str(Path.home())
    text = SECRET.sub("(secret)", text.replace(home, "~") if len(home) > 1 else text)
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or ""
    return re.sub(rf"(?<=/){re.escape(user)}(?=/|$)", "USER", text) if user and user != "root" else text


def about_versions() -> Iterator[Finding]:
    """Python and the libraries that decide the numbers."""
    found = versions() | {"commit": (git_commit() or "")[:10]}
    yield Finding("versions", "ok", ", ".join(f"{name} {value}" for name, value in found.items() if value))


def about_devices() -> Iterator[Finding]:
    """Cards with their free memory, whether bf16 is computed, and the host."""
    import torch

    from diffusion_align.devices import computes_bf16

    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        bf16 = "computes bf16" if computes_bf16(f"cuda:{number}") else "emulates bf16: use fp16"
        text = f"{torch.cuda.get_device_name(number)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, {bf16}"
        few = free < 0.5 * total
        fix = "another program holds its memory: nvidia-smi names it" if few else ""
        yield Finding(f"cuda:{number}", "warn" if few else "ok", text, fix)
    if torch.backends.mps.is_available():
        yield Finding("mps", "ok", "Apple's GPU, for drawing; training is not tested there")
    if not torch.cuda.device_count() and not torch.backends.mps.is_available():
        built = "" if torch.version.cuda is None else f", though torch is built for CUDA {torch.version.cuda}"
        fix = "models of SDXL's size need a card; install its driver, and torch for it" if built else ""
        yield Finding("gpu", "warn", f"none{built}", fix or "the embedded world (scenes-*) trains on a CPU in minutes")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    fast = "computes bf16" if computes_bf16("cpu") else "emulates bf16: mixed_precision auto leaves it off"
    yield Finding("cpu", "ok", f"{cores} cores, {torch.get_num_threads()} threads of torch, {fast}")


def about_packages() -> Iterator[Finding]:
    """Optional packages: whether those that are installed can be imported."""
    lacking = []
    for name, extra in OPTIONAL.items():
        if find_spec(name) is None:
            lacking.append(f"{name} ('diffusion-align[{extra}]')")
            continue
        try:
            import_module(name)
        except Exception as error:  # whatever a broken binary raises
            fix = f"reinstall it for this torch, or remove it: pip install --force-reinstall {name}"
            yield Finding(name, "fail", f"installed, but cannot be imported: {error}", fix)
            continue
        try:
            text = version(name)
        except PackageNotFoundError:
            text = "installed"
        yield Finding(name, "ok", text)
    if lacking:
        yield Finding("optional", "ok", f"not installed: {', '.join(lacking)}")


def about_cache() -> Iterator[Finding]:
    """Models and data sets of the hub that are here."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found = scan_cache_dir()
    except CacheNotFound:
        yield Finding("hub cache", "ok", "empty: models are fetched at first use")
        return
    repos = sorted(found.repos, key=lambda repo: -repo.size_on_disk)
    named = ", ".join(f"{repo.repo_id} ({repo.size_on_disk / GIB:.1f} GiB)" for repo in repos[:MOST_MODELS])
    more = f" and {len(repos) - MOST_MODELS} more" if len(repos) > MOST_MODELS else ""
    text = f"{found.size_on_disk / GIB:.1f} GiB: {named or 'nothing'}{more}"
    fix = "delete broken entries: hf cache prune" if found.warnings else ""
    yield Finding("hub cache", "warn" if found.warnings else "ok", text, fix)


def about_disk() -> Iterator[Finding]:
    """Room where runs and models go, and what a synced write costs."""
    from diffusion_align.shipped import cache_folder

    for name, place in (("disk, here", Path.cwd()), ("disk, home", Path.home())):
        free = shutil.disk_usage(place).free
        little = free < LITTLE_DISK
        fix = "checkpoints and caches of SDXL take tens of GiB: give --output-dir on another disk" if little else ""
        yield Finding(name, "warn" if little else "ok", f"{free / GIB:.0f} GiB free", fix)
    folder = cache_folder()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        fix = "name another folder in the environment variable DIFFUSION_ALIGN_CACHE"
        yield Finding("own cache", "fail", f"{folder} cannot be written", fix)
    with tempfile.TemporaryFile() as file:
        times = []
        for _ in range(10):
            begun = time.perf_counter()
            file.write(b"x" * 1000)
            file.flush()
            os.fsync(file.fileno())
            times.append(1000 * (time.perf_counter() - begun))
    middle = statistics.median(times)
    slow = middle > SLOW_FSYNC
    fix = "this disk is slow to sync (a network disk?): labels and journals will be, too" if slow else ""
    yield Finding("fsync", "warn" if slow else "ok", f"{middle:.1f} ms", fix)


def about_network() -> Iterator[Finding]:
    """Switches that keep libraries from the hub."""
    on = [name for name in FLAGS if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    text = f"{', '.join(on)} set: nothing is fetched" if on else "models and data sets are fetched when they are needed"
    yield Finding("hub", "ok", text)


def about_training() -> Iterator[Finding]:
    """Two steps of DPO on the embedded world."""
    from diffusion_align.training.run import train
    from diffusion_align.training.settings import load_recipe

    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        config = load_recipe(
            "scenes_dpo", max_steps=2, per_device_train_batch_size=2, output_dir=folder, report_to="none",
            progress=False, max_pairs=8, logging_steps=1,
        )  # fmt: skip
        result = train(config)
    yield Finding("training", "ok", f"{result.step} steps of scenes_dpo in {time.perf_counter() - begun:.0f} s")


#: In the order of the report; the last one is left out by --quick.
QUESTIONS: tuple[Callable[[], Iterator[Finding]], ...] = (
    about_versions, about_devices, about_packages, about_cache, about_disk, about_network, about_training,
)  # fmt: skip


def answered(questions: tuple[Callable[[], Iterator[Finding]], ...]) -> Iterator[Finding]:
    """All answers; a question that fails is an answer, too."""
    for question in questions:
        name = question.__name__.removeprefix("about_")
        try:
            yield from question()
        except Exception as error:  # the other questions are still worth asking
            yield Finding(name, "fail", f"{type(error).__name__}: {error}", "DIFFUSION_ALIGN_DEBUG=1 shows where")
