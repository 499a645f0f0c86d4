"""What a result depends on besides its settings."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from functools import cache
from pathlib import Path

LIBRARIES = ("diffusion-align", "torch", "diffusers", "accelerate", "peft", "transformers", "datasets")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the numbers."""
    known = {name: _version(name) for name in LIBRARIES}
    return {"python": platform.python_version()} | {name: found for name, found in known.items() if found is not None}


@cache
def _version(library: str) -> str | None:
    """None if it is not installed. Looked up once: all that is known of the library is read for it."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def git_commit() -> str | None:
    """Commit of the source tree this package runs from, when it is first asked for; None for an installed copy."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
