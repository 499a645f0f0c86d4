"""``diffusion-align doctor``: what is there, what is missing, what to do."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

from .health import QUESTIONS, answered, pasteable
from .helping_options import DoctorOptions


def run(options: DoctorOptions) -> int:
    """Ask everything and print the answers; returns 1 where something failed."""
    found = []
    for finding in answered(QUESTIONS[:-1] if options.quick else QUESTIONS):
        found.append({name: pasteable(str(text)) for name, text in asdict(finding).items()})
        if not options.json:
            told = found[-1]
            print(f"{told['state']:<5} {told['name']:<12} {told['text']}", flush=True)
            if told["fix"]:
                print(f"{'':<18} -> {told['fix']}", flush=True)
    counts = Counter(finding["state"] for finding in found)
    if options.json:
        print(json.dumps({"failed": bool(counts["fail"]), "findings": found}, indent=1))
    else:
        print(f"{counts['ok']} ok, {counts['warn']} warn, {counts['fail']} fail")
    return int(bool(counts["fail"]))
