"""The names that settings offer are those of the functions that there are."""

from __future__ import annotations

import subprocess
import sys

from diffusion_align.objectives import LIST_LOSSES, PREFERENCE_LOSSES, UNPAIRED_LOSSES
from diffusion_align.objectives.declared import declared


def test_the_source_and_the_registry_name_the_same_losses() -> None:
    assert declared("pair_loss") == tuple(PREFERENCE_LOSSES)
    assert declared("list_loss") == tuple(LIST_LOSSES)
    assert declared("unpaired_loss") == tuple(UNPAIRED_LOSSES)


def test_settings_list_the_losses_without_importing_torch() -> None:
    code = (
        "import sys, diffusion_align.training.pairs.config, diffusion_align.training.policy.preference_config as c; "
        "print(c.LossType.__args__, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == [*str(tuple(PREFERENCE_LOSSES)).split(), "False"]
