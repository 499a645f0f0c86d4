"""A reward in another process: the run is the same, a failure there stops it as one here does."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from diffusion_align.rewards import Ensemble
from diffusion_align.rewards.remote import RemoteScorer
from diffusion_align.rewards.serving import ScorerServer
from diffusion_align.rewards.watched import ScorerError
from tests.brightness import Brightness
from tests.training.online.short_runs import build, trained, weights


@pytest.mark.slow
def test_a_run_learns_the_same_from_a_reward_elsewhere(settings: dict[str, Any]) -> None:
    here = trained(build("nft", settings, updates_per_picture=1), scorer=Ensemble([Brightness()]))
    expected = weights(here.output_dir)
    with ScorerServer(Brightness(), port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reward = Ensemble([RemoteScorer(f"http://127.0.0.1:{server.server_port}")])
        there = trained(
            build("nft", settings, updates_per_picture=1, output_dir=f"{settings['output_dir']}-there"), scorer=reward
        )
        server.shutdown()
    found = weights(there.output_dir)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert [line["reward"] for line in there.history] == [line["reward"] for line in here.history]


@pytest.mark.slow
def test_a_server_that_goes_away_stops_the_run(settings: dict[str, Any]) -> None:
    server = ScorerServer(Brightness(), port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    reward = RemoteScorer(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()
    with pytest.raises(ScorerError, match="serve-scorer"):
        trained(build("nft", settings, updates_per_picture=1), scorer=reward)
