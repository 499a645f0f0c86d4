"""Labelling over HTTP while the whole server is killed at random instants."""

from __future__ import annotations

import http.client
import json
import random
import signal
import threading
from pathlib import Path

from tests.studio.material import scored_table
from tests.studio.serving import Studio, studio

#: Verdicts that are sent at most before a kill, and seconds from the last of them to it at most.
MOST, LONGEST = 24, 0.03


def label_through_kills(home: Path, kills: int, seed: int = 0) -> None:
    """What was answered with 200 is in the file, once and as it was sent; what was not is sent again by the next page,
    and then counts once."""
    rng = random.Random(seed)
    scored_table(home / "pairs", 2 * kills * MOST)
    acknowledged: dict[str, str] = {}
    unanswered: dict[str, str] = {}
    flags: tuple[str, ...] = ("--source", str(home / "pairs"), "--annotator", "ada")
    for _ in range(kills):
        with studio(home, *flags) as running:
            flags = ("--annotator", "ada")
            label_until_it_ends(running, rng, acknowledged, unanswered)
            assert running.process.wait(20) == -signal.SIGKILL
    with studio(home, *flags) as running:
        send(running, unanswered, acknowledged)
        visit = next(iter(acknowledged))  # had its answer before the server was killed: another one changes nothing
        done = running.ask("label-undo")["done"]
        assert running.ask("label-verdict", visit=visit, choice="tie", ms=400)["done"] == done
    rows = [json.loads(line) for line in (home / "labels" / "ada.jsonl").read_text().splitlines()]
    kept = [row for row in rows if row["event"] == "verdict"]
    assert len({row["id"] for row in kept}) == len(kept)
    assert {row["id"] for row in kept} == set(acknowledged)
    for row in kept:
        won = row["choice"] if row["choice"] != "better" else "left" if row["best"] == row["shown"][0] else "right"
        assert won == acknowledged[row["id"]]
    assert len(kept) > kills


def label_until_it_ends(
    running: Studio, rng: random.Random, acknowledged: dict[str, str], unanswered: dict[str, str]
) -> None:
    """Judge one pair after the other; the pair that is under way when the server dies is left unanswered."""
    last = rng.randint(1, MOST)
    try:
        send(running, unanswered, acknowledged)
        visits = running.ask("label-next")["visits"]
        for number in range(1, 2 * MOST):
            if number == last:
                delay = rng.uniform(0, LONGEST)
                threading.Timer(delay, running.process.send_signal, (signal.SIGKILL,)).start()
            visit, choice = visits[0]["id"], rng.choice(("left", "right", "tie", "skip"))
            unanswered[visit] = choice
            visits = running.ask("label-verdict", visit=visit, choice=choice, ms=400)["visits"]
            acknowledged[visit] = unanswered.pop(visit)
    except (OSError, http.client.HTTPException):
        return


def send(running: Studio, unanswered: dict[str, str], acknowledged: dict[str, str]) -> None:
    """What had no answer, as a page does that was not closed."""
    for visit, choice in list(unanswered.items()):
        running.ask("label-verdict", visit=visit, choice=choice, ms=400)
        acknowledged[visit] = unanswered.pop(visit)
