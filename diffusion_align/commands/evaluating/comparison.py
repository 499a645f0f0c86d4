"""``diffusion-align evaluate A B``: from sides to pictures, scores, verdicts and files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_align.commands.console import Progress, conclude, note
from diffusion_align.devices import pick_device
from diffusion_align.evaluation.arena import Board, detectable_gap, parse_sides, verdicts
from diffusion_align.evaluation.arena.votes import vote_verdicts
from diffusion_align.evaluation.artefacts import Further
from diffusion_align.files import check_writable
from diffusion_align.shipped import SHIPPED_MODELS

from .comparison_options import EvaluateOptions
from .comparison_page import write_page
from .comparison_table import comparison_table, told, write_details, write_table
from .people import read_votes, write_task
from .picture_drawing import Drawer, Drawn, begin, opening_key
from .picture_jobs import Gallery, Jobs, from_galleries, seeded
from .picture_scoring import Bench
from .prompt_sets import FRESH, PromptSet, load_set
from .scale_matching import Plan, best_scales, check_matching, effective_scales, plain_plan
from .side_opening import Side, described, open_sides, trained_on

#: What an evaluation leaves in its folder, all of it made again by --overwrite.
OWN = ("drawn.jsonl", "scored.jsonl", "table.json", "details.parquet", "report.html", "pictures", "sweep", "people")


@dataclass(frozen=True)
class Setup:
    """Everything that is known before the first picture.

    Attributes:
        given: prompts in the order of their file.
        galleries: folders of pictures, by side.
        validation: prompts that scales are chosen on; None without --match.
        scorers: judges, the first one also chooses scales.
    """

    options: EvaluateOptions
    sides: Sequence[Side]
    baseline: str
    prompts: PromptSet
    jobs: Jobs
    galleries: Mapping[str, Gallery]
    validation: Jobs | None
    scorers: Sequence[str]

    def task(self) -> dict[str, Any]:
        """What pictures and scores in the folder depend on, but for the scorers, of which more may be asked."""
        return {
            "sides": [described(side) for side in self.sides],
            "prompts": digest(self.jobs),
            "validation": None if self.validation is None else digest(self.validation),
            "batch_size": self.options.batch_size,
        }


def set_up(options: EvaluateOptions) -> Setup:
    """Read prompts, sides and folders of pictures; no model is loaded.

    Raises:
        ValueError, FileNotFoundError: what cannot be used is named.
    """
    sides = open_sides(parse_sides(options.sides), options)
    names = [side.name for side in sides]
    baseline = options.baseline or ("base" if "base" in names else names[0])
    check_matching(sides, options.match, baseline)
    galleries = {side.name: Gallery.open(side.folder, side.name) for side in sides if side.folder is not None}
    prompts = chosen_prompts(options, sides, galleries)
    own = from_galleries(galleries, prompts.prompts if options.prompts else None) if galleries else None
    jobs = own or seeded(prompts.prompts, options.seeds, options.seed)
    for side, gallery in galleries.items():
        gallery.arranged(jobs, prompts.prompts, side)  # before anything is drawn or written
    if options.artefact_monitor and len(jobs.prompts) < 2:
        raise ValueError("--artefact-monitor needs at least 2 prompts, for an interval over them")
    scorers = options.scorers or default_scorers(options, prompts)
    validation = None
    if options.match != "none":
        other = load_set(options.validation_prompts or "scenes", options.num_validation_prompts, validation=True)
        if options.validation_prompts is None and not of_scenes(options, prompts):
            raise ValueError(f"--match {options.match} needs --validation-prompts, prompts that are not tested on")
        both = sorted(set(other.prompts) & set(jobs.prompts))
        if both:
            raise ValueError(f"--validation-prompts: {both[0]!r} is tested on, too ({len(both)} prompts are in both)")
        validation = seeded(other.first(options.num_validation_prompts).prompts, 1, options.seed)
    return Setup(options, sides, baseline, prompts, jobs, galleries, validation, scorers)


def chosen_prompts(options: EvaluateOptions, sides: Sequence[Side], galleries: Mapping[str, Gallery]) -> PromptSet:
    """--prompts, or those of the folders of pictures, or for shipped models those of the embedded world."""
    if options.prompts is not None:
        return load_set(options.prompts, options.num_prompts or FRESH).first(options.num_prompts)
    if galleries:
        own = from_galleries(galleries, None)
        if own is None:
            name = next(side for side, gallery in galleries.items() if gallery.made_for is None)
            raise ValueError(
                f"side {name}: its pictures do not say what they were made for: give --prompts, a file with one prompt "
                f"for each {options.seeds} pictures in the order of their names (--seeds)"
            )
        return PromptSet(own.prompts).first(options.num_prompts)
    models = {side.drawing.model for side in sides if side.drawing is not None}
    if models <= set(SHIPPED_MODELS):
        return load_set("scenes", options.num_prompts or FRESH)
    raise ValueError("--prompts: give a file of prompts, or a set (parti, hpdv2, geneval, t2i-compbench)")


def of_scenes(options: EvaluateOptions, prompts: PromptSet) -> bool:
    """Whether the prompts are of the embedded world, whose oracle and further prompts come with the package."""
    return options.prompts in (None, "scenes") and not prompts.categories


def default_scorers(options: EvaluateOptions, prompts: PromptSet) -> tuple[str, ...]:
    """The oracle for prompts of the embedded world; none where people judge."""
    if options.judge == "people":
        return ()
    from diffusion_align.scenes.world.grammar import parse_prompt

    try:
        for prompt in prompts.prompts:
            parse_prompt(prompt)
    except ValueError:
        raise ValueError(
            "--scorers: name who judges, e.g. --scorers pickscore hps-v2.1 (diffusion-align scorers lists them)"
        ) from None
    return ("scenes-oracle",)


def prepare(setup: Setup) -> Path:
    """The folder, with journals that are of this task.

    Raises:
        ValueError: it holds an evaluation, and neither --resume nor --overwrite was given.
        OSError: it cannot be written.
    """
    options, out = setup.options, Path(setup.options.out)
    check_writable(out)
    if options.overwrite:
        for name in OWN:
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
    elif (out / "drawn.jsonl").exists() and not options.resume:
        raise ValueError(
            f"--out {out} holds an evaluation: go on with --resume, start again with --overwrite, or give another --out"
        )
    begin(out, setup.task())
    return out


def compare_sides(options: EvaluateOptions, say: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Draw what is missing, score, and write all files; returns what table.json holds.

    Raises:
        ValueError, FileNotFoundError, OSError: sides, prompts, scorers or a folder that cannot be used.
    """
    setup = set_up(options)
    learned = {side.name: trained_on(side, setup.scorers) for side in setup.sides}
    warnings = independence(setup, learned)
    for line in (*expected(setup), *warnings, *setup.prompts.notes):
        note(line)
    out = prepare(setup)
    drawer = Drawer(out, options.device, say)
    further = Further.load(pick_device(options.device)) if options.artefact_monitor else None
    bench = Bench(out, options.batch_size, options.device, say, further)
    plan = planned(setup, drawer, bench)
    ready = {name: pictures(setup, name, plan.entries[name], drawer) for name in by_model(plan)}
    drawn = {name: ready[name] for name in plan.entries}
    drawer.forget()
    scores = {scorer: bench.scores(scorer, drawn, setup.jobs) for scorer in setup.scorers}
    figures = bench.figures(drawn, setup.jobs)
    entries = list(plan.entries)
    board = Board(
        setup.jobs.prompts,
        entries,
        {scorer: np.stack([table[name] for name in entries]) for scorer, table in scores.items()},
        setup.prompts.categories,
    )
    votes = []
    found = verdicts(board, plan.contests)
    if options.judge == "people":
        task = write_task(out, drawn, plan.ranked, setup.jobs, options.seed)
        if options.resume:
            votes = read_votes(out)
            found = [*vote_verdicts(votes, plan.contests, setup.prompts.categories), *found]
        else:
            note(
                f"the blind task is {task}: label it (diffusion-align studio WORK --source {task}), put the exported "
                "labels beside it (data export), and give the same command with --resume"
            )
    table = comparison_table(
        board, plan, found, votes, figures, drawn, learned,
        facts={
            "sides": [described(side) for side in setup.sides],
            "prompts": {"count": len(setup.jobs.prompts), "sha256": digest(setup.jobs)},
            "seeds_per_prompt": setup.jobs.per_prompt,
            "match": options.match,
            "warnings": warnings,
            "notes": list(setup.prompts.notes),
        },
    )  # fmt: skip
    write_details(out / "details.parquet", board, setup.jobs, drawn)
    write_table(out / "table.json", table)
    write_page(out, table, board, drawn, setup.jobs, options.shown)
    return table


def planned(setup: Setup, drawer: Drawer, bench: Bench) -> Plan:
    """What is put beside what, at which scales."""
    if setup.validation is None:
        return plain_plan(setup.sides, setup.baseline)
    if setup.options.match == "scale":
        if not setup.scorers:
            raise ValueError("--match scale chooses scales by a scorer: give --scorers")
        return best_scales(
            setup.sides, setup.baseline, setup.scorers[0], setup.options.sweep, drawer, bench, setup.validation
        )
    return effective_scales(setup.sides, setup.baseline, setup.options.sweep, drawer, setup.validation)


def by_model(plan: Plan) -> list[str]:
    """Entries in an order in which each model is opened once."""
    keys = [None if settings is None else opening_key(settings) for settings in plan.entries.values()]
    return [name for name, _ in sorted(zip(plan.entries, keys, strict=True), key=lambda entry: keys.index(entry[1]))]


def pictures(setup: Setup, name: str, settings: Any, drawer: Drawer) -> Drawn:
    """An entry's pictures: drawn, or found in its folder."""
    if settings is not None:
        return drawer.draw(name, settings, setup.jobs)
    return Drawn.found(setup.galleries[name].arranged(setup.jobs, setup.prompts.prompts, name))


def expected(setup: Setup) -> list[str]:
    """What a comparison of this size can see, before anything is drawn."""
    prompts, judges = len(setup.jobs.prompts), max(1, len(setup.scorers))
    tests = judges * (len(setup.sides) - 1)
    worst = detectable_gap(0.5, prompts, tests)
    best = detectable_gap(0.5 / setup.jobs.per_prompt**0.5, prompts, tests)
    corrected = f", corrected for {tests} comparisons" if tests > 1 else ""
    size = f"{prompts} prompts x {setup.jobs.per_prompt} seeds"
    if best > 0.5:
        return [f"{size}: too few prompts to tell any win rate from 50%{corrected}"]
    if worst > 0.5:
        spread = f"{best:.1%}, where the seeds of a prompt agree no more than by chance"
    else:
        spread = f"{worst:.1%}" if best == worst else f"{best:.1%} to {worst:.1%}, by how much a prompt's seeds agree"
    return [f"{size}: a win rate is told from 50% (80% power{corrected}) if it differs by {spread}"]


def independence(setup: Setup, learned: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Which scorers are not independent of which sides; first, if none is."""
    lines = [
        f"{scorer} judges {side}, which was trained on it ({why})"
        for side, named in learned.items()
        for scorer, why in named.items()
    ]
    dependent = {scorer for named in learned.values() for scorer in named}
    if lines and dependent >= set(setup.scorers):
        lines.insert(0, "no scorer here is independent of what was trained: a gain may be over-optimisation")
    return lines


def digest(jobs: Jobs) -> str:
    """SHA-256 of prompts and seeds."""
    return sha256(repr(jobs.pairs()).encode()).hexdigest()


def run(options: EvaluateOptions) -> int:
    """Compare, and print the table; returns the exit status."""
    with Progress("evaluate") as progress:
        table = compare_sides(options, progress)
    out = Path(options.out)
    conclude(f"{told(table)}\nreport: {out / 'report.html'}", {**table, "out": str(out)})
    return 0
