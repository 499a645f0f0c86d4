"""Which pictures a comparison needs, and where those are that are there already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_align.evaluation.artefacts.picture_folders import picture_names
from diffusion_align.pictures import opened_picture


@dataclass(frozen=True)
class Jobs:
    """Prompts and the seeds of their pictures, the same for all sides.

    Attributes:
        prompts: P distinct ones, sorted: nothing depends on the order of a file.
        seeds: K of each prompt.
    """

    prompts: tuple[str, ...]
    seeds: tuple[tuple[int, ...], ...]

    @property
    def per_prompt(self) -> int:
        """K."""
        return len(self.seeds[0])

    def pairs(self) -> list[tuple[str, int]]:
        """(prompt, seed) of all pictures, a prompt's side by side."""
        return [(p, seed) for p, seeds in zip(self.prompts, self.seeds, strict=True) for seed in seeds]

    def chunks(self, pictures: int) -> Iterator[range]:
        """Positions in ``pairs`` that are drawn or scored together: whole prompts, about ``pictures`` each."""
        step = max(1, pictures // self.per_prompt) * self.per_prompt
        count = len(self.prompts) * self.per_prompt
        for start in range(0, count, step):
            yield range(start, min(start + step, count))


def seeded(prompts: Sequence[str], per_prompt: int, seed: int) -> Jobs:
    """Seeds from a prompt itself, so that prompts have their own noise wherever they stand."""
    texts = tuple(sorted(set(prompts)))

    def seeds(prompt: str) -> tuple[int, ...]:
        start = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4]) % 2**30
        return tuple(start + seed + number for number in range(per_prompt))

    return Jobs(texts, tuple(seeds(prompt) for prompt in texts))


@dataclass(frozen=True)
class Gallery:
    """A folder of pictures.

    Attributes:
        files: in the order of their names.
        made_for: prompt and seed of each, as generate writes them into its pictures; None where one has none.
    """

    folder: Path
    files: Sequence[Path]
    made_for: Sequence[tuple[str, int]] | None

    @classmethod
    def open(cls, folder: Path, side: str) -> Gallery:
        """Read every picture once.

        Raises:
            ValueError: one cannot be decoded; side and file are named.
        """
        files = [folder / name for name in picture_names(folder)]
        records = [opened_picture(file, f"side {side}: {file}").info.get("diffusion-align") for file in files]
        if any(record is None for record in records):
            return cls(folder, files, None)
        told = [json.loads(str(record)) for record in records]
        return cls(folder, files, [(str(each["prompt"]).strip(), int(each["seed"])) for each in told])

    def arranged(self, jobs: Jobs, given: Sequence[str], side: str) -> list[Path]:
        """Files in the order of ``jobs.pairs()``: by their records, or else K of each prompt in the order of names.

        Args:
            given: prompts in the order of their file.

        Raises:
            ValueError: a picture is missing, or their number does not fit.
        """
        if self.made_for is not None:
            known = dict(zip(self.made_for, self.files, strict=True))
            missing = [pair for pair in jobs.pairs() if pair not in known]
            if missing:
                prompt, seed = missing[0]
                raise ValueError(
                    f"side {side}: {self.folder} has no picture of {prompt!r} with seed {seed} "
                    f"({len(missing)} of {len(jobs.pairs())} are missing)"
                )
            return [known[pair] for pair in jobs.pairs()]
        count = jobs.per_prompt
        if len(self.files) != len(given) * count:
            raise ValueError(
                f"side {side}: {self.folder} has {len(self.files)} pictures without a record of their prompt; "
                f"expected {count} of each of {len(given)} prompts, {len(given) * count} in the order of their names"
            )
        place = {prompt: index for index, prompt in enumerate(given)}
        return [self.files[place[prompt] * count + number] for prompt in jobs.prompts for number in range(count)]


def from_galleries(galleries: Mapping[str, Gallery], prompts: Sequence[str] | None) -> Jobs | None:
    """What folders of pictures hold, by their records; None where some have none.

    Args:
        prompts: the only ones that count; None: all.

    Raises:
        ValueError: prompts with unequally many pictures, or no picture of a prompt.
    """
    seeds: dict[str, list[int]] = {}
    wanted = None if prompts is None else set(prompts)
    for side, gallery in galleries.items():
        if gallery.made_for is None:
            return None
        own: dict[str, list[int]] = {}
        for prompt, seed in gallery.made_for:
            if wanted is None or prompt in wanted:
                own.setdefault(prompt, []).append(seed)
        if not seeds:
            seeds = own
        for prompt in sorted({*seeds, *own, *(prompts or ())}):
            if sorted(own.get(prompt, [])) != sorted(seeds.get(prompt, [])) or prompt not in own:
                raise ValueError(
                    f"side {side}: {gallery.folder} has pictures of {prompt!r} with seeds {own.get(prompt, [])}, "
                    f"expected {seeds.get(prompt, [])}"
                )
    texts = tuple(sorted(seeds))
    counts = {len(seeds[prompt]) for prompt in texts}
    if len(counts) > 1:
        raise ValueError(f"prompts have {min(counts)} to {max(counts)} pictures: expected equally many of each")
    return Jobs(texts, tuple(tuple(sorted(seeds[prompt])) for prompt in texts))
