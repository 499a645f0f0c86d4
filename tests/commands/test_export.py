"""``diffusion-align export``: whatever a run trained, in the layout that is asked for, with the same effect."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from diffusion_align.adapters import load_adapter
from diffusion_align.adapters.lora_files import KOHYA_FILE, LORA_FILE
from diffusion_align.adapters.policy_files import BASE_FIELD
from diffusion_align.cli import main
from diffusion_align.sampling.sampler import generate
from diffusion_align.training.engine.loop import TrainResult
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.run import train

PROMPT, SEED = "a large red star on a dark background", 1


@pytest.fixture
def config(sdxl_folder: Path, pairs_folder: Path, tmp_path: Path) -> DPOConfig:
    return DPOConfig(
        model=str(sdxl_folder), dataset=str(pairs_folder), output_dir=str(tmp_path / "run"), max_steps=2, save_steps=1,
        per_device_train_batch_size=2, learning_rate=3e-2, lora_rank=2, lora_alpha=8.0, report_to="none",
        progress=False,
    )  # fmt: skip


def drawn(source: Path, *weights: Path) -> torch.Tensor:
    adapter = load_adapter(source).load_weights(*weights)
    return generate(adapter, [PROMPT], num_inference_steps=3, seeds=[SEED])


def drawn_by(pipeline: Any) -> torch.Tensor:
    """The same picture by plain diffusers."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    options = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "pt"}
    return pipeline(PROMPT, generator=generator, **options).images


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def export(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Path:
    """What the command says that it wrote."""
    capsys.readouterr()
    assert main(["export", *map(str, arguments)]) == 0
    said = capsys.readouterr()
    assert not [line for line in said.err.splitlines() if not line.startswith("note: ")]  # and no bars
    return Path(said.out.splitlines()[-1])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["export", *map(str, arguments)]) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_lora_is_exported_without_reading_the_models_weights(
    config: DPOConfig, sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = shutil.copytree(sdxl_folder, tmp_path / "model"), tmp_path / "run"
    train(replace(config, model=str(model), max_steps=1))
    for file in model.rglob("*.safetensors"):
        file.unlink()
    assert export(capsys, run, "--format", "diffusers").read_bytes() == (run / LORA_FILE).read_bytes()
    written, own = load_file(export(capsys, run, "--format", "kohya")), load_file(run / KOHYA_FILE)
    assert written.keys() == own.keys()
    assert all(torch.equal(written[name], own[name]) for name in own)


@pytest.mark.slow
def test_a_run_is_the_same_picture_in_every_format(
    config: DPOConfig, sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config)
    run, want = tmp_path / "run", drawn(sdxl_folder, tmp_path / "run")
    assert distance(want, drawn(sdxl_folder)) > 1e-3
    for layout in ("diffusers", "kohya", "sd-scripts"):
        file = export(capsys, run, "--format", layout)
        assert file == tmp_path / f"run-{layout}.safetensors"
        assert file.stat().st_mode & 0o777 == 0o644
        pipeline = DiffusionPipeline.from_pretrained(sdxl_folder)
        pipeline.load_lora_weights(tmp_path, weight_name=file.name)
        assert distance(drawn_by(pipeline), want) < 1e-4, layout
    merged = export(capsys, run, "--format", "merged")
    assert distance(drawn_by(DiffusionPipeline.from_pretrained(merged)), want) < 1e-4
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in merged.rglob("*") if file.is_file())
    assert "already there" in refused(capsys, run, "--format", "merged")
    half = export(capsys, run, "--format", "merged", "--dtype", "fp16", "--out", tmp_path / "half")
    assert {t.dtype for t in load_file(next((half / "unet").glob("*.safetensors"))).values()} == {torch.float16}


@pytest.mark.slow
def test_a_checkpoint_holds_loras_and_is_exported_beside_its_run(
    config: DPOConfig, sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config)
    first, last = (tmp_path / "run" / f"checkpoint-0000000{step}" for step in (1, 2))
    assert torch.equal(drawn(sdxl_folder, last), drawn(sdxl_folder, tmp_path / "run"))
    assert distance(drawn(sdxl_folder, first), drawn(sdxl_folder, last)) > 1e-3
    pipeline = DiffusionPipeline.from_pretrained(sdxl_folder)
    pipeline.load_lora_weights(first)
    assert distance(drawn_by(pipeline), drawn(sdxl_folder, first)) < 1e-4
    file = export(capsys, first, "--format", "kohya")
    assert file == tmp_path / "run-checkpoint-00000001-kohya.safetensors"
    assert distance(drawn(sdxl_folder, file), drawn(sdxl_folder, first)) < 1e-4


@pytest.mark.slow
def test_all_weights_are_merged_and_are_no_lora(
    config: DPOConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = load_adapter(config.model)
    train(replace(config, full_finetuning=True, learning_rate=1e-3, max_steps=1), adapter)
    want = generate(adapter, [PROMPT], num_inference_steps=3, seeds=[SEED])
    checkpoint = tmp_path / "run" / "checkpoint-00000001"
    for source in (tmp_path / "run", checkpoint):
        assert (
            distance(drawn_by(DiffusionPipeline.from_pretrained(export(capsys, source, "--format", "merged"))), want)
            < 1e-4
        )
    assert "holds all weights of the network and no LoRA" in refused(capsys, tmp_path / "run", "--format", "kohya")


@pytest.mark.slow
@pytest.mark.parametrize("of_0_1", [False, True], ids=["new", "of 0.1"])
def test_what_a_run_started_from_is_exported_with_it(
    of_0_1: bool, config: DPOConfig, sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of 0.1 held only what the run added to its ``init_weights``."""
    first: TrainResult = train(config)
    adapter = load_adapter(config.model).load_weights(first.output_dir)
    second = replace(config, output_dir=str(tmp_path / "second"), init_weights=str(first.weights), seed=1)
    run = tmp_path / "second"
    result = train(second)
    assert result.weights is not None
    want = drawn(sdxl_folder, run)
    assert distance(want, generate(adapter, [PROMPT], num_inference_steps=3, seeds=[SEED])) > 1e-3
    if of_0_1:  # the second half of each matrix is what the run added
        state = {
            key: tensor[2:] if "lora_A" in key else tensor[:, 2:] for key, tensor in load_file(result.weights).items()
        }
        for file in run.glob("*.safetensors"):
            file.unlink()
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, result.weights, {"format": "pt"})
    else:
        assert (
            load_file(result.weights)[
                "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
            ].shape[0]
            == 4
        )
    for layout in ("kohya", "diffusers"):
        assert distance(drawn(sdxl_folder, export(capsys, run, "--format", layout)), want) < 1e-4
    merged = DiffusionPipeline.from_pretrained(export(capsys, run, "--format", "merged"))
    assert distance(drawn_by(merged), want) < 1e-4


@pytest.mark.slow
def test_what_is_missing_or_contradicts_is_named(
    sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = load_adapter(sdxl_folder).train_lora(rank=2).save(tmp_path)
    assert "nowhere: no such file or folder" in refused(capsys, tmp_path / "nowhere", "--format", "kohya")
    assert "has no config.yaml: give --model" in refused(capsys, file, "--format", "kohya")
    out = tmp_path / "x.safetensors"
    assert "writes a folder" in refused(capsys, file, "--format", "merged", "--out", out)
    assert "writes a .safetensors file" in refused(capsys, file, "--format", "kohya", "--out", tmp_path / "x")
    assert export(capsys, file, "--format", "kohya", "--out", out, "--model", sdxl_folder) == out
    (tmp_path / "config.yaml").write_text("method: reward\n")
    assert "trains no diffusion model" in refused(capsys, file, "--format", "sd-scripts")
    (tmp_path / "config.yaml").write_text(f"method: dpo\nmodel: {sdxl_folder}\n")
    save_file(load_file(file), tmp_path / "y.safetensors", {BASE_FIELD: "other weights"})
    assert "on weights that no file names" in refused(capsys, tmp_path / "y.safetensors", "--format", "kohya")
