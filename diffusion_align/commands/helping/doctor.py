"""``diffusion-align doctor``: what is there, what is missing, what to do."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

from diffusion_align.commands.console import conclude

from .health import QUESTIONS, answered, pasteable
from .helping_options import DoctorOptions


def run(options: DoctorOptions) -> int:
    """Ask everything and print the answers; returns 1 where something failed."""
    found = []
    for finding in answered(QUESTIONS[:-1] if options.quick else QUESTIONS):
        told = {name: pasteable(str(text)) for name, text in asdict(finding).items()}
        fix = f"\n{'':<18} -> {told['fix']}" if told["fix"] else ""
        conclude(f"{told['state']:<5} {told['name']:<12} {told['text']}{fix}", {})
        found.append(told)
    counts = Counter(finding["state"] for finding in found)
    summary = f"{counts['ok']} ok, {counts['warn']} warn, {counts['fail']} fail"
    conclude(summary, {"failed": bool(counts["fail"]), "findings": found})
    return int(bool(counts["fail"]))
