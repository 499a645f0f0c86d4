"""The best setting's policy once more, on prompts and noise that it was not chosen on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffusion_align.devices import pick_device
from diffusion_align.files import write_whole
from diffusion_align.training.policy.config import TrainConfig
from diffusion_align.training.policy.model import load_policy_model
from diffusion_align.training.policy.validation import build_validator

from .outcomes import Result
from .spec import Run, Sweep

#: What is added to the seed of the noise: that of the runs' own pictures counts up from it.
OTHER_NOISE = 1_000_003
WINNER = "winner.json"


@dataclass(frozen=True)
class Winner:
    """Win rate of the best setting's first run, with other noise.

    Attributes:
        folder: of the run.
        win_rate, low, high: over the base, with its 95% interval.
        prompts: how many.
        other_prompts: whether they are others than those that it was chosen on.
    """

    folder: str
    win_rate: float
    low: float
    high: float
    prompts: int
    other_prompts: bool

    def __str__(self) -> str:
        prompts = "others" if self.other_prompts else "the same, which are all there are"
        return (
            f"{self.folder} once more, on {self.prompts} prompts ({prompts}), with other noise: "
            f"win rate {self.win_rate:.1%} [{self.low:.1%}, {self.high:.1%}]"
        )


def check_winner(sweep: Sweep, results: Sequence[Result], runs: Sequence[Run]) -> Winner | None:
    """Look at the best setting's first run, unless that was done, and keep it in winner.json.

    None where win rates are not what counts, where no run is done, or where all weights were trained, beside which the
    base is not kept.
    """
    best = results[0]
    done = [run for run in runs if run.folder.name in best.folders and run.config.seed in best.seeds]
    if sweep.metric != "eval/win_rate" or best.mean is None or not done:
        return None
    run, path = done[0], sweep.out / WINNER
    config = run.config
    if not isinstance(config, TrainConfig) or config.full_finetuning:
        return None
    kept: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if kept.get("folder") == run.folder.name:
        return Winner(**kept)
    winner = looked_at(run.folder, config)
    write_whole(path, json.dumps(asdict(winner)).encode())
    return winner


def looked_at(folder: Path, config: TrainConfig) -> Winner:
    """The run's policy against its base, on the validation's next prompts if there are enough of them."""
    count = config.num_validation_prompts
    other = replace(
        config,
        num_validation_prompts=2 * count,
        validation_seed=config.validation_seed + OTHER_NOISE,
        held_out_scorers=(),
        kl_prompts=0,
        stop_on=(),
        artefact_monitor=False,
    )
    adapter = load_policy_model(config, pick_device("auto")).load_weights(folder)
    validator = build_validator(other, adapter, folder / "winner")
    pictures = count * config.validation_seeds_per_prompt
    fresh = len(validator.prompts) == 2 * pictures
    rows = list(range(pictures, 2 * pictures)) if fresh else list(range(len(validator.prompts)))
    validator = replace(
        validator,
        prompts=[validator.prompts[row] for row in rows],
        holes=None if validator.holes is None else validator.holes.at(rows),
        watch=None,
    )
    found = validator(config.max_steps)
    rate, low, high = (found[f"eval/win_rate{part}"] for part in ("", "_low", "_high"))
    return Winner(folder.name, rate, low, high, len(rows) // config.validation_seeds_per_prompt, fresh)
