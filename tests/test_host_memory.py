"""Freed memory stays in the process on a CPU, unless the user configured malloc."""

from __future__ import annotations

import subprocess
import sys

import pytest

from diffusion_align.host_memory import OWN_SETTINGS, keep_freed_memory

#: Page faults of filling ever larger blocks, in a fresh process: what glibc was told lasts for its life. By default a
#: block that is larger than all before comes from the system, whatever was freed.
FAULTS = """
import resource, sys
import torch
from diffusion_align.host_memory import keep_freed_memory

if sys.argv[1] == "kept" and not keep_freed_memory("cpu"):
    sys.exit("no glibc")
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for megabytes in range(1, 17):
    torch.ones(megabytes * 2**18)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(kept: str) -> int:
    result = subprocess.run([sys.executable, "-c", FAULTS, kept], capture_output=True, text=True)
    if "no glibc" in result.stderr:
        pytest.skip("this C library has no mallopt")
    return int(result.stdout)


@pytest.mark.slow
def test_kept_memory_is_used_again_without_page_faults() -> None:
    assert page_faults("kept") < page_faults("default") / 2


@pytest.mark.parametrize("name", OWN_SETTINGS)
def test_the_users_own_malloc_settings_hold(name: str) -> None:
    assert not keep_freed_memory("cpu", {name: "1"})


def test_accelerators_are_left_alone() -> None:
    assert not keep_freed_memory("cuda", {})
