"""Scores of a run's own pictures, with a watch on the scorer: a reward that fails must never pass for a number."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffusion_align.data.holes import Holes
from diffusion_align.files import save_tensors

from .combine import Ensemble
from .context import score_with_context
from .factory import load_scorer
from .protocol import RewardOutput, RewardScorer


class ScorerError(RuntimeError):
    """A scorer that raised, gave numbers that are not finite, or took too long; the message names it and the batch."""


def load_reward(
    names: Sequence[str], how: str, device: torch.device | str, standardise: str = "running"
) -> RewardScorer:
    """One scorer, or an ensemble of several.

    Args:
        how, standardise: as in ``Ensemble``.

    Raises:
        ValueError: no name, or one that ``load_scorer`` does not know.
    """
    if not names:
        raise ValueError("scorers is empty: expected at least one scorer")
    members = [load_scorer(name, device=device) for name in names]
    return members[0] if len(members) == 1 else Ensemble(members, how, standardise=standardise)  # type: ignore[arg-type]


class WatchedScorer:
    """Scores with a time limit and a check of the result.

    Args:
        timeout: seconds for one batch; 0 sets no limit and scores in the caller's own thread, as a debugger needs it.
        folder: where the batch goes that a scorer fails on.
    """

    def __init__(self, scorer: RewardScorer, timeout: float, folder: Path) -> None:
        self.scorer, self.timeout, self.folder = scorer, timeout, folder

    def __call__(
        self, images: Tensor, prompts: Sequence[str], holes: Holes | None = None, with_graph: bool = False
    ) -> RewardOutput:
        """Scores of ``images`` (B, 3, H, W); higher is better, whatever the scorer's own sign.

        Args:
            with_graph: keep the graph to the images; else rewards come detached, on the CPU.

        Raises:
            ScorerError: see the class; ``failed_batch.safetensors`` holds images and prompts.
        """
        found: list[RewardOutput | Exception] = []

        def work() -> None:
            try:
                with torch.set_grad_enabled(with_graph):
                    found.append(score_with_context(self.scorer, images, prompts, holes))
            except Exception as error:
                found.append(error)

        if self.timeout:
            # A daemon: a scorer that hangs must not keep the process alive.
            worker = threading.Thread(target=work, daemon=True)
            worker.start()
            worker.join(self.timeout)
        else:
            work()
        if not found:
            self._fail(f"gave no answer within {self.timeout:g} s (scorer_timeout)", images, prompts)
        output = found[0]
        if isinstance(output, Exception):
            self._fail(f"failed: {type(output).__name__}: {output}", images, prompts, output)
        assert isinstance(output, RewardOutput)
        reward, features = output.reward.float(), output.features
        members = None if output.members is None else output.members.detach().float().cpu()
        if not with_graph:
            reward = reward.detach().cpu()
            features = None if features is None else features.detach().float().cpu()
        for picture, value in enumerate(reward.tolist()):
            if not math.isfinite(value):
                self._fail(f"gave {value} for picture {picture} ({prompts[picture]!r})", images, prompts)
        return RewardOutput(reward if self.scorer.higher_is_better else -reward, features=features, members=members)

    def _fail(self, what: str, images: Tensor, prompts: Sequence[str], cause: Exception | None = None) -> None:
        path = self.folder / "failed_batch.safetensors"
        save_tensors(path, {"images": images}, {"prompts": "\n".join(prompts)})
        name = self.scorer.name or type(self.scorer).__name__
        raise ScorerError(f"scorer {name} {what}; the batch is saved in {path}") from cause
