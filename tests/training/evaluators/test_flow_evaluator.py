"""An evaluator of a flow model's latents: levels and latents as guidance shows them, and whose latents it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_align.adapters import Conditioning, load_adapter
from diffusion_align.commands.generate import generate_files
from diffusion_align.commands.options import GenerateOptions
from diffusion_align.data import Comparisons
from diffusion_align.guidance.dynamic import DynamicGuidance
from diffusion_align.guidance.judges.evaluator import EvaluatorSettings, LatentEvaluator, load_evaluator
from diffusion_align.sampling.control import SamplingOptions
from diffusion_align.sampling.sampler import sample
from diffusion_align.training.evaluators.config import EvaluatorConfig
from diffusion_align.training.evaluators.noisy_pairs import EncodedPairs, log_snrs, noised, seeded_batches
from diffusion_align.training.run import train
from tests.adapters.families.tiny_flow import LENGTH, build_flow_vae, louder

KINDS: Any = ("alignment", "preference")


@pytest.fixture(scope="module")
def evaluator_folder(sd3_folder: Path, pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny SD3's latents, trained for two steps."""
    folder = tmp_path_factory.mktemp("flow-evaluator")
    config = EvaluatorConfig(
        model=str(sd3_folder), dataset=str(pairs_folder), kinds=KINDS, output_dir=str(folder), max_steps=2,
        per_device_train_batch_size=4, width=8, features=16, eval_steps=2, report_to="none", progress=False,
        max_sequence_length=LENGTH,
    )  # fmt: skip
    assert train(config).weights == folder / "evaluator"
    return folder


@pytest.mark.slow
def test_dynamic_guidance_asks_an_evaluator_of_flow_latents(
    evaluator_folder: Path, sd3_folder: Path, tmp_path: Path
) -> None:
    options = GenerateOptions(
        prompt="a red star", model=str(sd3_folder), guidance="dynamic", evaluator=str(evaluator_folder),
        evaluators=KINDS, candidates=(1.5, 4.0), num_inference_steps=2, num_images=1,
        out=str(tmp_path), max_sequence_length=LENGTH, skip_guidance_layers=(1,), skip_layer_guidance_stop=1.0,
    )  # fmt: skip
    (picture,) = generate_files(options)
    record = json.loads(picture.with_suffix(".json").read_text())
    assert record["nfe"] == 5  # two predictions a step, and a third in the second one: some blocks are left out there
    assert set(record["scales"]) <= {1.5, 4.0}
    assert all(torch.tensor(record["scores"][kind]).isfinite().all() for kind in KINDS)
    lines = [json.loads(line) for line in (evaluator_folder / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/calibration/preference/0-199" in line for line in lines)


@pytest.mark.slow
def test_levels_and_latents_are_those_of_the_twin_path(sd3_folder: Path, pairs_folder: Path) -> None:
    """x / sqrt((1 - s)^2 + s^2) at log-SNR 2 ln((1 - s) / s), with all of the times from picture to noise."""
    adapter = load_adapter(sd3_folder, max_sequence_length=LENGTH)
    (batch,) = seeded_batches(EncodedPairs(adapter, Comparisons(str(pairs_folder), "train")), adapter.path)
    sigma = batch.t
    assert float(sigma.min()) < 0.3
    assert float(sigma.max()) > 0.7
    torch.testing.assert_close(log_snrs(adapter, sigma), 2 * ((1 - sigma) / sigma).log(), rtol=1e-4, atol=1e-4)
    at = sigma.view(-1, 1, 1, 1)
    straight = (1 - at) * batch.pairs.images[0] + at * batch.noise
    torch.testing.assert_close(noised(adapter, batch)[0], straight / ((1 - at) ** 2 + at**2).sqrt())


def test_sixteen_channels_are_read() -> None:
    """As of SD3's and FLUX's own autoencoders, and prompts of any number of tokens."""
    judge = LatentEvaluator(EvaluatorSettings(16, 16, 72, 32, KINDS, 8, 16))
    cond = Conditioning(torch.randn(2, 333, 72), torch.randn(2, 32))
    judge.check(torch.zeros(2, 16, 16, 16), cond)
    scores = judge.scores(torch.randn(2, 16, 16, 16), torch.tensor([-6.0, 5.0]), cond, torch.ones(2))
    assert all(values.isfinite().all() for values in scores.values())
    with pytest.raises(ValueError, match=r"for latents .* \(16, 16, 72, 32\), this model has \(4, 16, 72, 32\)"):
        judge.check(torch.zeros(2, 4, 16, 16), cond)


@pytest.mark.slow
def test_latents_of_another_autoencoder_are_refused(evaluator_folder: Path, sd3_folder: Path) -> None:
    adapter, evaluator = load_adapter(sd3_folder, max_sequence_length=LENGTH), load_evaluator(evaluator_folder)
    own = adapter.vae

    def draw(judge: LatentEvaluator) -> float:
        guider = DynamicGuidance(kinds=KINDS, candidates=(1.5, 4.0))
        guider.use(judge, [])
        square = SamplingOptions(height=32, width=32)
        return sample(adapter, ["a red star"], num_inference_steps=1, guidance=guider, options=square).nfe

    assert evaluator.latents == adapter.latent_space()
    adapter.pipeline.vae = own.half()  # the same weights in another precision
    assert draw(evaluator) == 2
    own.float()
    torch.manual_seed(7)
    others = build_flow_vae()
    louder(others)
    for vae, message in (
        (build_flow_vae(scale=0.3611), "its scale is 1.5305, this model's 0.3611"),
        (build_flow_vae(shift=0.1159), "its shift is 0.0609, this model's 0.1159"),
        (others, "its weights are others"),
    ):
        adapter.pipeline.vae = vae.eval()
        with pytest.raises(ValueError, match=rf"another autoencoder \({message}.*\): train an evaluator"):
            draw(evaluator)
    settings = replace(evaluator.settings, latents=None)
    assert "latents" not in settings.to_json()
    with pytest.warns(UserWarning, match="does not say which autoencoder's latents .* the autoencoder is not"):
        assert draw(LatentEvaluator(settings)) == 2
