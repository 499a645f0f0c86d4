"""The drawing process: takes orders, draws them as ``generate`` does, one picture at a time."""

from __future__ import annotations

import os
import shlex
import signal
import traceback
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_align.commands.options import GenerateOptions
from diffusion_align.evaluation.arena.side_grammar import parse_side

from .orders import Ended, Finished, Opened, Order, Stepped, Told

if TYPE_CHECKING:
    from diffusion_align.commands.evaluating.picture_drawing import Tools


class CancelledError(Exception):
    """Nobody wants this order any more."""


@dataclass
class Artist:
    """Draws orders; the last model and all scorers stay loaded.

    Attributes:
        tell: is told what becomes of an order.
        wanted: the number of the order that may be drawn; any other is cancelled, between two steps.
    """

    tell: Callable[[Told], None]
    wanted: Callable[[], int]
    _drawer: Any = None
    _scorers: dict[str, Any] = field(default_factory=dict)

    def draw(self, order: Order) -> None:
        """All pictures of an order, column by column, as models are slow to load."""
        from diffusion_align.commands.evaluating.comparison_options import EvaluateOptions
        from diffusion_align.commands.evaluating.picture_drawing import Drawer
        from diffusion_align.commands.evaluating.side_opening import open_sides

        self._drawer = self._drawer or Drawer(Path(order.folder), "auto", lambda text, done, count: None)
        texts = [parse_side(text) for text in order.columns.values()]
        common = EvaluateOptions(
            sides=tuple(order.columns.values()), model=order.model, batch_size=1,
            num_inference_steps=order.num_inference_steps, guidance_scale=order.guidance_scale,
        )  # fmt: skip
        for column, side in zip(order.columns, open_sides(texts, common), strict=True):
            if side.drawing is None:
                raise ValueError(f"{order.columns[column]}: a folder of pictures has nothing to draw: label it instead")
            strength = order.strengths.get(column)
            options = replace(side.drawing, prompt=order.prompts[0], num_images=len(order.seeds), seed=order.seeds[0])
            if strength is not None and (options.lora or strength != 1):
                options = replace(options, alignment_strength=strength)
            self.tell(Opened(order.number, column, command_of(options, order), bool(options.lora)))
            self._still(order)
            tools = self._drawer.tools(order.columns[column], options)
            for row in range(len(order.rows)):
                self._picture(order, column, row, options, tools)

    def _picture(self, order: Order, column: int, row: int, options: GenerateOptions, tools: Tools) -> None:
        from diffusion_align.commands.generate import draw
        from diffusion_align.sampling.sampler import to_uint8

        prompt, seed = order.rows[row]
        self._still(order)
        model = self._drawer.model(options)

        def on_guided(guided: Any) -> None:
            self._still(order)
            self.tell(Stepped(order.number, column, row, guided.view.step + 1, options.num_inference_steps))

        images, told = draw(model, options, tools.guider, tools.scorer, [prompt], [seed], None, on_guided)
        (pixels,), (facts,) = to_uint8(images), told
        folder = Path(order.folder) / str(column)
        folder.mkdir(parents=True, exist_ok=True)
        file = tools.writer.write(folder, row, (prompt, seed), pixels, facts)
        shown: dict[str, Any] = {name: facts[name] for name in ("nfe", "scales", "reward_calls") if name in facts}
        if options.guidance == "dynamic":
            shown["candidates"] = list(options.candidates)
        shown["scores"] = {name: self._score(name, file, prompt, model.device) for name in order.scorers}
        self.tell(Finished(order.number, column, row, str(file), shown))

    def _score(self, name: str, file: Path, prompt: str, device: Any) -> float:
        import torch

        from diffusion_align.pictures import decoded_picture
        from diffusion_align.rewards import load_scorer

        if name not in self._scorers:
            self._scorers[name] = load_scorer(name).to(device)
        with torch.no_grad():
            return float(self._scorers[name].score([decoded_picture(file, str(file))], [prompt]).reward[0])

    def _still(self, order: Order) -> None:
        if self.wanted() != order.number:
            raise CancelledError


def command_of(options: GenerateOptions, order: Order) -> str:
    """What draws a column's pictures again, one line for each prompt."""
    own = {"prompt", "prompts", "out", "num_images", "seed", "batch_size"}
    words: list[str] = []
    for part in fields(GenerateOptions):
        value = getattr(options, part.name)
        usual = part.default_factory() if part.default_factory is not MISSING else part.default
        if part.name not in own and value != usual:
            given = value if isinstance(value, tuple) else (value,)
            flag = f"--{part.name.replace('_', '-')}"
            words += [flag] if value is True else [flag, *map(str, given)]
    seeds = ["--seed", str(order.seeds[0]), "--num-images", str(len(order.seeds)), "--batch-size", "1"]
    return "\n".join(shlex.join(["diffusion-align", "generate", prompt, *words, *seeds]) for prompt in order.prompts)


def work(orders: Connection, wanted: Synchronized[int], home: str, idle: float) -> None:
    """The process's life: orders until there is none for ``idle`` seconds, or the studio is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the studio's
    os.chdir(home)  # sides are written as seen from the studio's folder

    def tell(told: Told) -> None:
        orders.send(told)

    artist = Artist(tell, lambda: wanted.value)
    try:
        while orders.poll(idle):
            order = orders.recv()
            try:
                artist.draw(order)
                tell(Ended(order.number))
            except CancelledError:
                tell(Ended(order.number, cancelled=True))
            except Exception as error:
                if os.environ.get("DIFFUSION_ALIGN_DEBUG"):
                    traceback.print_exc()
                tell(Ended(order.number, error=str(error) or type(error).__name__))
    except (EOFError, OSError):
        return  # the studio has ended
