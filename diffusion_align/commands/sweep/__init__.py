"""``diffusion-align sweep``: the same run with many settings, one folder each, and a table of what they came to."""

from __future__ import annotations

import json
from functools import partial

from diffusion_align.commands.console import conclude, note
from diffusion_align.commands.parsing import parse_options

from .sweep_options import SweepOptions

#: From arguments to checked options.
parse = partial(parse_options, SweepOptions, "sweep", bare="--file")


def run(options: SweepOptions) -> int:
    """Do the runs that are not done yet, or say which there would be; returns the exit status."""
    from .spec import load_sweep, plan_text, planned

    sweep = load_sweep(options)
    runs = planned(sweep)
    plan = plan_text(sweep, runs)
    if options.dry_run:
        conclude(plan, {"plan": plan})
        return 0
    note(plan)
    from .outcomes import ranked, told, write_results
    from .running import run_all, start_process
    from .winner import check_winner

    status = run_all(runs, start_process, sweep.jobs, sweep.devices)
    results = ranked(sweep, runs)
    winner = check_winner(sweep, results, runs) if status == 0 else None
    said = "" if winner is None else str(winner)
    write_results(sweep, runs, results, said)
    conclude(told(sweep, results, said), json.loads((sweep.out / "results.json").read_text()))
    return status
