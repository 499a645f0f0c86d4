"""Pictures that are judged while more are drawn."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from diffusion_align.training.policy.run_reward import InTurn


def batches() -> list[tuple[range, Tensor]]:
    return [(range(start, start + 2), torch.full((2, 3, 4, 4), float(start))) for start in (0, 2, 4)]


@pytest.mark.parametrize("meanwhile", [False, True])
def test_outputs_come_in_the_order_of_the_batches(meanwhile: bool) -> None:
    seen: list[int] = []

    def judge(rows: range, pictures: Tensor) -> float:
        seen.append(rows.start)
        return float(pictures.mean())

    with InTurn(judge, meanwhile) as judging:
        for rows, pictures in batches():
            judging.take(rows, pictures)
        assert judging.outputs() == [0.0, 2.0, 4.0]
    assert seen == [0, 2, 4]


def test_the_first_batch_is_judged_while_the_second_is_drawn() -> None:
    began = threading.Event()

    def judge(rows: range, pictures: Tensor) -> bool:
        began.set()
        return True

    (first, second, _) = batches()
    with InTurn(judge, meanwhile=True) as judging:
        judging.take(*first)
        assert began.wait(10)  # nothing more was taken yet
        judging.take(*second)
        assert judging.outputs() == [True, True]


@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_judge_that_fails_is_heard_of_and_stops(meanwhile: bool) -> None:
    calls: list[int] = []

    def judge(rows: range, pictures: Tensor) -> None:
        calls.append(rows.start)
        raise ValueError("no reward")

    with InTurn(judge, meanwhile) as judging:
        judging.take(*batches()[0])
        with pytest.raises(ValueError, match="no reward"):
            judging.outputs()
    assert calls == [0]
