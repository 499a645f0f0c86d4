"""What scorers and measures say of pictures, kept as it comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from diffusion_align.data.tending.duplicates import picture_hash
from diffusion_align.devices import pick_device
from diffusion_align.evaluation.artefacts import Figures, Further, measure
from diffusion_align.evaluation.artefacts.picture_measures import SMALLEST_SIDE, near_duplicates
from diffusion_align.files import append_rows, read_journal
from diffusion_align.pictures import decoded_picture
from diffusion_align.rewards import RewardScorer, load_scorer

from .picture_drawing import Drawn
from .picture_jobs import Jobs

Array = NDArray[np.float64]
#: Stands for a scorer in the journal: figures of pictures.
ARTEFACTS, MONITOR = "(artefacts)", "(artefact monitor)"


@dataclass
class Bench:
    """Scores pictures, one scorer at a time.

    Attributes:
        out: folder of the journal.
        batch_size: pictures scored at once.
        further: figures of the artefact monitor; None leaves them out.
        say: told what is going on.
    """

    out: Path
    batch_size: int
    device: str
    say: Callable[[str, int, int], None]
    further: Further | None = None
    _done: dict[tuple[str, str, int], dict[str, Any]] | None = field(default=None, init=False)
    _scorer: RewardScorer | None = field(default=None, init=False)

    @property
    def journal(self) -> Path:
        """One line for each batch of each scorer."""
        return self.out / "scored.jsonl"

    @property
    def artefacts(self) -> str:
        """What stands for a scorer in lines with figures of pictures: they are no others' if more is measured."""
        if self.further is None:
            return ARTEFACTS
        return MONITOR if self.further.brisque is None else f"{MONITOR} with BRISQUE"

    def scores(self, scorer: str, drawn: Mapping[str, Drawn], jobs: Jobs, inside: str = "pictures") -> dict[str, Array]:
        """(P, K) of each side, more is better.

        Raises:
            ValueError: a scorer that needs more than a picture and its prompt, or a picture that cannot be decoded.
        """
        self._scorer, found = None, {}
        for side, pictures in drawn.items():
            values = [
                value
                for chunk in jobs.chunks(self.batch_size)
                for value in self._chunk(scorer, f"{inside}/{side}", pictures, jobs, chunk)["scores"]
            ]
            found[side] = np.array(values, dtype=np.float64).reshape(len(jobs.prompts), jobs.per_prompt)
        self._scorer = None
        return found

    def figures(self, drawn: Mapping[str, Drawn], jobs: Jobs) -> dict[str, Figures] | None:
        """Figures of each side's pictures; None where some are smaller than can be measured, or differ in size.

        Raises:
            ValueError: that is so, and the artefact monitor was asked for.
        """
        found = {}
        for side, pictures in drawn.items():
            parts: dict[str, list[float]] = {}
            hashes: list[int] = []
            for chunk in jobs.chunks(self.batch_size):
                row = self._chunk(self.artefacts, f"pictures/{side}", pictures, jobs, chunk)
                if row["figures"] is None and self.further is not None:
                    raise ValueError(
                        f"--artefact-monitor: side {side}: expected pictures of one size for each prompt, of at least "
                        f"{SMALLEST_SIDE} pixels"
                    )
                if row["figures"] is None:
                    return None
                for name, values in row["figures"].items():
                    parts.setdefault(name, []).extend(values)
                hashes += row.get("hashes", [])
            columns = {name: torch.tensor(values).double() for name, values in parts.items()}
            if hashes:  # of all pictures together
                columns["near_duplicates"] = near_duplicates(hashes, jobs.per_prompt)
            found[side] = Figures(**columns)
        return found

    def _chunk(self, scorer: str, side: str, pictures: Drawn, jobs: Jobs, chunk: range) -> dict[str, Any]:
        """A batch's line of the journal, made if it is not there or of other pictures."""
        if self._done is None:
            self._done = {(row["scorer"], row["side"], row["start"]): row for row in read_journal(self.journal)[1:]}
        hashes = list(pictures.hashes[chunk.start : chunk.stop])
        row = self._done.get((scorer, side, chunk.start))
        if row is not None and row["pictures"] == hashes:
            return row
        name = side.partition("/")[2]
        loaded = [decoded_picture(file, f"side {name}: {file}") for file in pictures.files[chunk.start : chunk.stop]]
        found: dict[str, Any] = {"scorer": scorer, "side": side, "start": chunk.start, "pictures": hashes}
        if scorer == self.artefacts:
            found["figures"] = measured(loaded, jobs.per_prompt, self.further)
            found |= {} if self.further is None else {"hashes": [picture_hash(picture) for picture in loaded]}
        else:
            prompts = [prompt for prompt, _ in jobs.pairs()[chunk.start : chunk.stop]]
            found["scores"] = self._scored(scorer, loaded, prompts)
        append_rows(self.journal, [found])
        self._done[scorer, side, chunk.start] = found
        self.say(f"{scorer.strip('()')} of {name}", chunk.stop, len(jobs.pairs()))
        return found

    def _scored(self, name: str, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        if self._scorer is None:
            self._scorer = load_scorer(name, device=pick_device(self.device))
            if self._scorer.needs:
                needs = ", ".join(sorted(self._scorer.needs))
                raise ValueError(f"scorer {name} needs {needs}: it cannot judge pictures with a prompt alone")
        with torch.no_grad():
            reward = self._scorer.score(pictures, prompts).reward.double()
        wrong = torch.nonzero(~reward.isfinite())
        if len(wrong):
            raise ValueError(f"scorer {name} says {reward[wrong[0, 0]]} of a picture of {prompts[int(wrong[0, 0])]!r}")
        scores: list[float] = (reward if self._scorer.higher_is_better else -reward).tolist()
        return scores


def measured(
    pictures: Sequence[Image.Image], per_prompt: int, further: Further | None = None
) -> dict[str, list[float]] | None:
    """Figures by name, one value a prompt; None of pictures that are too small for them."""
    if any(min(picture.size) < SMALLEST_SIDE for picture in pictures):
        return None
    found: dict[str, list[float]] = {}
    for start in range(0, len(pictures), per_prompt):
        arrays = [np.asarray(picture) for picture in pictures[start : start + per_prompt]]
        if len({array.shape for array in arrays}) > 1:
            return None
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
        for name, values in measure(images, per_prompt, further=further).columns().items():
            found.setdefault(name, []).extend(values.tolist())
    return found
