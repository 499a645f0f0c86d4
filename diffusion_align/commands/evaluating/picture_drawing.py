"""Pictures of all sides, drawn as ``generate`` draws them, and kept as they come: a run that died goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from diffusion_align.adapters import Adapter
from diffusion_align.commands.generate import PictureWriter, build_guider, draw, slug
from diffusion_align.commands.opening import open_contrastive, say_what_is_cut
from diffusion_align.commands.options import DrawingOptions, GenerateOptions
from diffusion_align.devices import pick_device
from diffusion_align.files import append_rows, read_journal, sha256_of
from diffusion_align.rewards import RewardScorer, load_scorer
from diffusion_align.sampling.sampler import to_uint8

from .picture_jobs import Jobs

#: What decides which model is opened.
OPENING = (*(part.name for part in fields(DrawingOptions)), "negative_lora", "negative_keep", "negative_merge")


@dataclass(frozen=True)
class Drawn:
    """One side's pictures.

    Attributes:
        files: P K of them, in the order of the jobs.
        hashes: SHA-256 of the files.
        calls: denoiser calls a picture; None of pictures that were there.
        scorer_calls: a picture, of search with a scorer.
        seconds: of drawing, all pictures; peak_bytes: of device memory; None where not measured.
    """

    files: Sequence[Path]
    hashes: Sequence[str]
    calls: float | None = None
    scorer_calls: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None

    @classmethod
    def found(cls, files: Sequence[Path]) -> Drawn:
        """Pictures that are there already."""
        return cls(files, [sha256_of(file) for file in files])


@dataclass(frozen=True)
class Tools:
    """What serves all batches of a side: its guider, the scorer of search with one, and what writes its pictures."""

    guider: Any
    scorer: RewardScorer | None
    writer: PictureWriter


@dataclass
class Drawer:
    """Draws sides into a folder, one model at a time.

    Attributes:
        out: pictures go to out/pictures/NAME.
        device: as a name of torch, or auto.
        say: told what is going on.
    """

    out: Path
    device: str
    say: Callable[[str, int, int], None]
    _key: Any = field(default=None, init=False)
    _model: Adapter | None = field(default=None, init=False)
    _done: dict[tuple[str, int], dict[str, Any]] | None = field(default=None, init=False)
    _folders: dict[str, str] = field(default_factory=dict, init=False)

    @property
    def journal(self) -> Path:
        """One line for each batch that is done."""
        return self.out / "drawn.jsonl"

    def model(self, options: GenerateOptions) -> Adapter:
        """The model of these options; the last one is kept."""
        key = opening_key(options)
        if self._model is None or self._key != key:
            self._model = None  # before the next one is loaded
            opened = open_contrastive(
                options, pick_device(self.device), options.negative_lora, options.negative_keep, options.negative_merge
            )
            if opened.is_inpainting:
                raise ValueError(
                    f"{options.model} is an inpainting model, which needs pictures and masks: compare folders of its "
                    "pictures"
                )
            self._key, self._model = key, opened
        return self._model

    def forget(self) -> None:
        """Give the model's memory back: nothing more is drawn."""
        self._key = self._model = None

    def draw(self, name: str, options: GenerateOptions, jobs: Jobs, inside: str = "pictures") -> Drawn:
        """All pictures of one side; what the journal has, and is still there as it was, is not drawn again.

        Args:
            name: of the side, for its folder.
            inside: folder of ``out``.
        """
        folder = self._folder(inside, name)
        pairs = jobs.pairs()
        rows: list[dict[str, Any]] = []
        tools: Tools | None = None
        for chunk in jobs.chunks(options.batch_size):
            row = self._known(f"{inside}/{name}", chunk.start, len(chunk))
            if row is None:
                if not rows:
                    say_what_is_cut(self.model(options), jobs.prompts)
                tools = tools or self.tools(f"{inside}/{name}", options)
                row = self._chunk(f"{inside}/{name}", options, tools, pairs, chunk, folder)
                append_rows(self.journal, [row])
                self.say(f"drawing {name}", chunk.stop, len(pairs))
            rows.append(row)
        pictures = [picture for row in rows for picture in row["pictures"]]
        peaks = [row["peak_bytes"] for row in rows if row["peak_bytes"] is not None]
        return Drawn(
            [self.out / picture["file"] for picture in pictures],
            [picture["sha256"] for picture in pictures],
            sum(picture["nfe"] for picture in pictures) / len(pictures),
            sum(picture["reward_calls"] for picture in pictures) / len(pictures),
            sum(row["seconds"] for row in rows),
            max(peaks, default=None),
        )

    def _folder(self, inside: str, name: str) -> Path:
        """Of one side; names that differ only in signs have folders of their own."""
        wanted, number = slug(name, 80), 1
        place = wanted
        while self._folders.setdefault(f"{inside}/{place}", name) != name:
            number += 1
            place = f"{wanted}-{number}"
        folder = self.out / inside / place
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _known(self, side: str, start: int, count: int) -> dict[str, Any] | None:
        """What the journal has of a batch, if its files are as they were."""
        if self._done is None:
            self._done = {(row["side"], row["start"]): row for row in read_journal(self.journal)[1:]}
        row = self._done.get((side, start))
        if row is None or len(row["pictures"]) != count:
            return None
        for picture in row["pictures"]:
            path = self.out / picture["file"]
            if not path.is_file() or sha256_of(path) != picture["sha256"]:
                return None
        return row

    def tools(self, side: str, options: GenerateOptions) -> Tools:
        """What draws with these options, beside the model.

        Raises:
            ValueError: a search without a scorer; ``side`` is named.
        """
        model = self.model(options)
        guider, writer = build_guider(options), PictureWriter.of(model, options)
        if options.search == "none":
            return Tools(guider, None, writer)
        if options.scorer is None:
            raise ValueError(f"side {side}: search={options.search} needs scorer=NAME")
        return Tools(guider, load_scorer(options.scorer).to(model.device), writer)

    def _chunk(
        self,
        side: str,
        options: GenerateOptions,
        tools: Tools,
        pairs: Sequence[tuple[str, int]],
        chunk: range,
        folder: Path,
    ) -> dict[str, Any]:
        model, batch = self.model(options), [pairs[i] for i in chunk]
        counted = model.device.type == "cuda"
        if counted:
            torch.cuda.reset_peak_memory_stats(model.device)
        begun = time.perf_counter()
        images, told = draw(
            model, options, tools.guider, tools.scorer, [p for p, _ in batch], [s for _, s in batch], None
        )
        pixels = to_uint8(images)
        seconds = time.perf_counter() - begun
        pictures = []
        for number, job, picture, facts in zip(chunk, batch, pixels, told, strict=True):
            path = tools.writer.write(folder, number, job, picture, facts)
            pictures.append(
                {
                    "file": str(path.relative_to(self.out)),
                    "sha256": sha256_of(path),
                    "nfe": float(facts["nfe"]),
                    "reward_calls": float(facts.get("reward_calls", 0)),
                }
            )
        peak = torch.cuda.max_memory_allocated(model.device) if counted else None
        return {"side": side, "start": chunk.start, "seconds": seconds, "peak_bytes": peak, "pictures": pictures}


def opening_key(options: GenerateOptions) -> tuple[Any, ...]:
    """Equal where the same model is opened."""
    return tuple(getattr(options, name) for name in OPENING)


def begin(out: Path, task: Mapping[str, Any]) -> None:
    """Begin the journals of a folder, or see that they are of this very task.

    Raises:
        ValueError: the folder holds another comparison; what differs is named.
    """
    for name in ("drawn.jsonl", "scored.jsonl"):
        rows = read_journal(out / name)
        if not rows:
            out.mkdir(parents=True, exist_ok=True)
            append_rows(out / name, [task])
        elif rows[0] != task:
            differing = ", ".join(key for key in {**task, **rows[0]} if rows[0].get(key) != task.get(key))
            raise ValueError(
                f"{out / name} is of a comparison with other {differing}: give --overwrite, or another --out"
            )


def at_scale(options: GenerateOptions, scale: float) -> GenerateOptions:
    """The same at another guidance scale."""
    return replace(options, guidance_scale=float(scale))
