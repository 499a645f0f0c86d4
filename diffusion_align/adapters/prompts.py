"""Prompts to conditioning in chunks of one shape, so that a prompt's bits are its own; and a memory of recent ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from diffusion_align.devices import send

from .adapter import Adapter
from .conditioning import Conditioning

#: Prompts that the text encoders get at once: always exactly this many.
CHUNK = 8
#: Tokens of the start and end of a text. All others stand for a byte or more.
ENDS = 2
#: Bytes of remembered rows: about 400 prompts of SDXL in float32, ten times as many of SD 1.x in half precision.
CAPACITY = 256 * 2**20


def encode_in_chunks(adapter: Adapter, prompts: Sequence[str | None]) -> Conditioning:
    """Conditioning of ``prompts`` (B rows), the same bits for a prompt whatever stands before, after or beside it.

    None is the null prompt, as in ``Adapter.encode_prompts``.

    Kernels choose their order of summation by the shape they are given, and in the last bits their results differ. The
    last chunk is therefore filled up, by repeating its last prompt.

    Raises:
        ValueError: no prompt is given.
    """
    if not prompts:
        raise ValueError("encode_in_chunks needs at least one prompt")
    parts = []
    for start in range(0, len(prompts), CHUNK):
        part = list(prompts[start : start + CHUNK])
        parts.append(adapter.encode_prompts(part + part[-1:] * (CHUNK - len(part)))[: len(part)])
    return Conditioning.cat(parts)


class PromptEncoder:
    """Remembers the conditioning of recent prompts: captions repeat, text encoders are slow.

    Remembered rows lie in the host's memory, also where the model is on an accelerator. What a call returns is on the
    model's device and depends neither on what was remembered nor on the other prompts of the call.

    Args:
        capacity: bytes of rows that are kept between calls; those used longest ago are forgotten first.

    Attributes:
        held: bytes of the rows that are remembered now.
    """

    def __init__(self, adapter: Adapter, capacity: int = CAPACITY) -> None:
        self.adapter, self.capacity = adapter, capacity
        self.rows: OrderedDict[str | None, Conditioning] = OrderedDict()
        self.held = 0

    def __call__(self, prompts: Sequence[str | None]) -> Conditioning:
        """Conditioning of ``prompts`` (B rows); each distinct one that is not remembered is encoded once."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.rows]
        if missing:
            encoded = encode_in_chunks(self.adapter, missing).to("cpu")
            for i, prompt in enumerate(missing):
                row = encoded[i : i + 1].map(Tensor.clone)  # a view would keep the whole chunk alive
                self.rows[prompt] = row
                self.held += byte_count(row)
        for prompt in prompts:
            self.rows.move_to_end(prompt)
        found = Conditioning.cat([self.rows[prompt] for prompt in prompts])
        while self.held > self.capacity:
            _, row = self.rows.popitem(last=False)
            self.held -= byte_count(row)
        return found.map(lambda rows: send(rows, self.adapter.device))


def byte_count(cond: Conditioning) -> int:
    """Bytes of all tensors of ``cond``."""
    total = 0
    for field in fields(cond):
        tensor = getattr(cond, field.name)
        total += 0 if tensor is None else tensor.nbytes
    return total


def conditioning(
    adapter: Adapter,
    prompts: Sequence[str | None],
    height: int,
    width: int,
    inpaint: Tensor | None = None,
    encode: Callable[[Sequence[str | None]], Conditioning] | None = None,
) -> Conditioning:
    """What images of ``height`` x ``width`` pixels are drawn with: prompts, SDXL's size ids, hole and masked image.

    Args:
        encode: instead of ``adapter.encode_prompts``, e.g. one that remembers.
    """
    cond = (encode or adapter.encode_prompts)(prompts)
    sizes = adapter.family.size_ids(torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32))
    time_ids = None if sizes is None else send(sizes, adapter.device).expand(len(prompts), -1)
    hole = None if inpaint is None else send(inpaint, adapter.device)
    return replace(cond, time_ids=time_ids, inpaint=hole)


def cut_prompts(adapter: Adapter, prompts: Sequence[str]) -> set[int]:
    """Places of the prompts that are longer than some text encoder of the model reads."""
    cut: set[int] = set()
    done: list[Any] = []
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(adapter.pipeline, name, None)
        if tokenizer is None or any(_count_alike(tokenizer, other) for other in done):
            continue
        done.append(tokenizer)
        most = tokenizer.model_max_length
        long = [i for i, prompt in enumerate(prompts) if len(prompt.encode()) > most - ENDS]
        if long:
            tokens = tokenizer([prompts[i] for i in long], truncation=False, verbose=False).input_ids
            cut |= {i for i, ids in zip(long, tokens, strict=True) if len(ids) > most}
    return cut


def _count_alike(first: Any, second: Any) -> bool:
    """Whether two tokenizers give texts the same lengths; SDXL's two differ in what they fill up with."""
    return first.model_max_length == second.model_max_length and first.get_vocab() == second.get_vocab()
