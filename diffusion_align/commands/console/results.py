"""Where results go, and whether anything else is said."""

from __future__ import annotations

import json
import os
from typing import Any

#: Set by --quiet, for this process and those that it starts.
QUIET = "DIFFUSION_ALIGN_QUIET"


def quiet() -> bool:
    """Whether only results and errors are wanted."""
    return bool(os.environ.get(QUIET))


def say_less() -> None:
    """What --quiet does: no progress, no notes, from here on."""
    os.environ[QUIET] = "1"


def print_result(text: object) -> None:
    """A result, on stdout."""
    print(text, flush=True)


def print_json(value: Any) -> None:
    """The one JSON object that --json promises, on stdout."""
    print(json.dumps(value, indent=2), flush=True)
