"""A rollout that is not used up comes back from a checkpoint, whichever version wrote it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_align.training.engine.checkpoint import CheckpointError
from diffusion_align.training.online.rollout import Rollout, RolloutStream, Trajectory

PROMPTS = ["a red circle", "a red circle", "two blue squares", "two blue squares"]
#: Everything that 0.1.0 wrote of a rollout, by its keys there, and the shape of each.
OLD_KEYS: dict[str, tuple[int, ...]] = {
    "rollout.latents": (4, 4, 8, 8),
    "rollout.reward": (4,),
    "rollout.advantage": (4,),
    "rollout.trust": (4,),
    "rollout.group": (4,),
    "rollout.inpaint": (4, 5, 8, 8),
    "rollout.drawn": (4,),
    "rollout.steps": (4, 2),
    "rollout.before": (4, 2, 4, 8, 8),
    "rollout.after": (4, 2, 4, 8, 8),
    "rollout.old_log_prob": (4, 2),
}
ONE_PROCESS: Any = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))


def old_state(*left_out: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in OLD_KEYS.items() if key not in left_out}
    return {"number": 3, "position": 1, "prompts": PROMPTS, **tensors}


def never_drawn(number: int) -> Rollout:
    raise AssertionError("the rollout is in the checkpoint")


def stream_from(state: dict[str, Any], accelerator: Any = ONE_PROCESS) -> RolloutStream:
    stream = RolloutStream(never_drawn, items=2, batch_size=2, steps=1, seed=0)
    stream.load_state_dict(state, accelerator)
    return stream


def test_what_0_1_0_wrote_is_read() -> None:
    state = old_state()
    found = stream_from(state)
    assert (found.number, found.position) == (3, 1)
    rollout = found.rollout
    assert rollout is not None
    assert rollout.trajectory is not None
    assert rollout.prompts == PROMPTS
    for holder, names in (
        (rollout, ("latents", "reward", "advantage", "trust", "group", "inpaint", "drawn", "steps")),
        (rollout.trajectory, ("before", "after", "old_log_prob")),
    ):
        for name in names:
            assert torch.equal(getattr(holder, name), state[f"rollout.{name}"]), name


def test_what_is_written_has_the_same_keys() -> None:
    state = old_state()
    written = stream_from(state).state_dict(ONE_PROCESS)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in OLD_KEYS)
    assert written["prompts"] == PROMPTS


def test_every_process_takes_its_share_of_the_pictures() -> None:
    state = old_state()
    second: Any = SimpleNamespace(num_processes=2, process_index=1, device=torch.device("cpu"))
    rollout = stream_from(state, second).rollout
    assert rollout is not None
    assert rollout.prompts == PROMPTS[2:]
    assert torch.equal(rollout.reward, state["rollout.reward"][2:])


def test_a_batch_has_the_rows_of_every_field() -> None:
    stream = stream_from(old_state())
    whole = stream.rollout
    assert whole is not None
    batch = next(iter(stream))
    expected = stream.order(3, 0, 8)[2:4]
    assert torch.equal(batch.picture * 2 + batch.column, expected)
    assert batch.rollout.prompts == [PROMPTS[i] for i in batch.picture]
    rows, all_rows = batch.rollout.tensors(), whole.tensors()
    assert rows.keys() == all_rows.keys() == {key.removeprefix("rollout.") for key in OLD_KEYS}
    assert all(torch.equal(rows[name], all_rows[name][batch.picture]) for name in rows)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (old_state("rollout.reward"), "missing 1 required positional argument: 'reward'"),
        (old_state("rollout.before"), "missing 1 required positional argument: 'before'"),
        ({**old_state(), "rollout.mood": torch.zeros(4)}, "unexpected keyword argument 'mood'"),
    ],
)
def test_a_rollout_with_other_parts_is_one_error(state: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"the checkpoint's rollout has latents, .*{message}"):
        stream_from(state)


def test_what_a_method_has_no_use_for_is_not_written() -> None:
    def one() -> Tensor:
        return torch.zeros(2, 1)

    plain = Rollout(["a", "b"], one(), one(), one(), one(), one())
    assert plain.tensors().keys() == {"latents", "reward", "advantage", "trust", "group"}
    with_steps = Rollout(["a", "b"], *plain.tensors().values(), trajectory=Trajectory(one(), one(), one()))
    assert with_steps.tensors().keys() == {*plain.tensors(), "before", "after", "old_log_prob"}
