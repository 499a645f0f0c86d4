"""Freed memory stays in the process on a CPU, unless the user configured malloc."""

from __future__ import annotations

import subprocess
import sys

import pytest

from diffusion_align.host_memory import OWN_SETTINGS, keep_freed_memory

#: Page faults of filling ever larger blocks, by default and then kept, each in a process of its own: what glibc was
#: told lasts for its life. By default a block that is larger than all before comes from the system, whatever was freed.
FAULTS = """
import os, resource, sys
import torch
from diffusion_align.host_memory import keep_freed_memory

for kept in (False, True):
    if os.fork():
        os.wait()
        continue
    if kept and not keep_freed_memory("cpu"):
        sys.exit("no glibc")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in range(1, 17):
        torch.ones(megabytes * 2**18)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)
    os._exit(0)
"""


@pytest.mark.slow
def test_kept_memory_is_used_again_without_page_faults() -> None:
    found = []
    for _ in range(4):  # in one process of five, small objects lie between the blocks by chance
        result = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True)
        if "no glibc" in result.stderr:
            pytest.skip("this C library has no mallopt")
        default, kept = map(int, result.stdout.split())
        if kept < default / 2:
            return
        found.append((default, kept))
    pytest.fail(f"page faults by default and with kept memory: {found}")


@pytest.mark.parametrize("name", OWN_SETTINGS)
def test_the_users_own_malloc_settings_hold(name: str) -> None:
    assert not keep_freed_memory("cpu", {name: "1"})


def test_accelerators_are_left_alone() -> None:
    assert not keep_freed_memory("cuda", {})
