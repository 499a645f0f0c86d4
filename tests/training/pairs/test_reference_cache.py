"""Fixed draws of noise, and reference errors remembered: never another number than without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.data import CachedPairs, FixedDraws, PairLoader, PairTransform, PixelExamples, load_pairs
from diffusion_align.training.engine.checkpoint import list_checkpoints
from diffusion_align.training.engine.loop import TrainResult
from diffusion_align.training.pairs.config import DPOConfig, InPOConfig
from diffusion_align.training.pairs.error_memory import ErrorMemory
from diffusion_align.training.pairs.loading import build_pair_source
from diffusion_align.training.pairs.method import PairMethod
from diffusion_align.training.pairs.noising import GaussianNoising
from diffusion_align.training.pairs.remembering import build_reference, facts
from diffusion_align.training.policy.model import prepare_policy
from diffusion_align.training.run import train
from diffusion_align.training.settings import load_config, save_config
from tests.processes import TwoProcesses

SAME = ("loss", "grad_norm", "margin", "rewards/chosen", "rewards/rejected")


@pytest.fixture(scope="module")
def config(sdxl_folder: Path, pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DPOConfig:
    """Four steps of four pairs with two draws each: the third step at the latest meets a pair's draw again."""
    folder = tmp_path_factory.mktemp("shared")
    return DPOConfig(
        model=str(sdxl_folder), dataset=str(pairs_folder), cache_dir=str(folder / "cache"), max_pairs=4,
        pair_selection="first", noise_draws=2, caption_dropout=0.3, max_steps=4, per_device_train_batch_size=4,
        learning_rate=1e-3, beta=500.0, lora_rank=4, logging_steps=1, save_steps=2, report_to="none", progress=False,
    )  # fmt: skip


@pytest.fixture
def fresh_cache(config: DPOConfig, tmp_path: Path) -> Callable[..., DPOConfig]:
    """``config`` with changes, a latent cache without errors, and a run folder of its own at each call."""
    runs = iter(range(100))

    def build(**changes: Any) -> DPOConfig:
        folders = {"cache_dir": str(tmp_path / "cache"), "output_dir": str(tmp_path / f"run{next(runs)}")}
        return replace(config, **{**folders, **changes})

    return build


@pytest.fixture(scope="module")
def straight(config: DPOConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run that remembers nothing."""
    return train(replace(config, output_dir=str(tmp_path_factory.mktemp("straight") / "run")))


def numbers(history: list[dict[str, float]]) -> list[list[float]]:
    return [[line[name] for name in SAME] for line in history]


def hits(history: list[dict[str, float]]) -> list[float]:
    return [line["reference_hits"] for line in history]


def same_weights(first: TrainResult, second: TrainResult) -> bool:
    ours, theirs = (
        load_file(list_checkpoints(result.output_dir)[-1] / "policy.safetensors") for result in (first, second)
    )
    return all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


def files(config: DPOConfig) -> list[Path]:
    assert config.cache_dir is not None
    return sorted((Path(config.cache_dir) / "reference").glob("*.safetensors"))


# -- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixed_precision": "bf16"},
        {"full_finetuning": True, "learning_rate": 1e-5, "random_flip": False},
        {"loss_type": "kto", "sft_weight": 0.1, "lora_dropout": 0.1, "min_timestep": 500},
    ],
    ids=["lora", "bf16", "full", "kto with dropout"],
)
def test_remembered_errors_train_bit_for_bit_like_computed_ones(
    changes: dict[str, Any], fresh_cache: Callable[..., DPOConfig], straight: TrainResult
) -> None:
    plain = train(fresh_cache(**changes)) if changes else straight
    remembered = train(fresh_cache(**changes, reference_cache=True))
    assert numbers(remembered.history) == numbers(plain.history)
    assert same_weights(remembered, plain)
    assert hits(remembered.history)[0] == 0
    assert max(hits(remembered.history)) > 0


@pytest.mark.slow
def test_inpo_with_the_references_inversion_is_as_exact(fresh_cache: Callable[..., DPOConfig]) -> None:
    def inpo(**changes: Any) -> InPOConfig:
        return InPOConfig(**vars(fresh_cache(**changes)), inversion_model="reference", inversion_steps=2)

    plain, remembered = train(inpo(max_steps=3)), train(inpo(max_steps=3, reference_cache=True))
    assert numbers(remembered.history) == numbers(plain.history)
    assert max(hits(remembered.history)) > 0


@pytest.mark.slow
def test_another_loss_and_batch_size_find_every_error_known(fresh_cache: Callable[..., DPOConfig]) -> None:
    train(fresh_cache(reference_cache=True, max_steps=8))
    other = {"loss_type": "ipo", "per_device_train_batch_size": 3, "max_steps": 3}
    found = train(fresh_cache(**other, reference_cache=True))
    assert hits(found.history) == [1.0] * 3
    assert numbers(found.history) == numbers(train(fresh_cache(**other)).history)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True], ids=["file kept", "file lost"])
def test_a_resumed_run_is_bit_for_bit_one_run(
    lost: bool, fresh_cache: Callable[..., DPOConfig], straight: TrainResult
) -> None:
    first = fresh_cache(reference_cache=True, max_steps=2)
    train(first)
    if lost:
        files(first)[0].unlink()
    resumed = train(replace(first, max_steps=4, resume_from_checkpoint="latest"))
    assert numbers(resumed.history) == numbers(straight.history)[2:]


@pytest.mark.slow
def test_two_processes_remember_together(fresh_cache: Callable[..., DPOConfig], two_processes: TwoProcesses) -> None:
    """What one learned the other knows after a checkpoint, and a run in one process knows it, too."""
    shared: dict[str, Any] = {"max_steps": 6, "save_steps": 3}
    halves = {**shared, "per_device_train_batch_size": 2}
    plain = two_processes.train(fresh_cache(**halves))
    both = two_processes.train(fresh_cache(**halves, reference_cache=True))
    assert numbers(both) == numbers(plain)
    alone = train(fresh_cache(**shared, reference_cache=True))
    assert hits(alone.history) == [1.0] * 6
    assert numbers(alone.history) == numbers(train(fresh_cache(**shared)).history)


@pytest.mark.slow
def test_only_unknown_pairs_are_asked_of_the_reference(
    fresh_cache: Callable[..., DPOConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, adapter = method_of(fresh_cache(reference_cache=True))
    batch = next(iter(method.source))
    sizes = []
    predict = adapter.predict
    monkeypatch.setattr(adapter, "predict", lambda x_t, *rest: sizes.append(len(x_t)) or predict(x_t, *rest))  # type: ignore[func-returns-value]
    first, second = (method.loss(batch)[1] for _ in range(2))
    assert sizes == [2, 2, 2, 2, 8, 8]
    assert (first["reference_hits"], second["reference_hits"]) == (0, 1)


@pytest.mark.slow
def test_pair_by_pair_differs_from_the_batch_by_rounding_only(fresh_cache: Callable[..., DPOConfig]) -> None:
    method, adapter = method_of(fresh_cache())
    for parameter in adapter.trainable_parameters().values():
        parameter.data += 0.1
    batch = next(iter(method.source))
    whole = PairMethod(method.config, adapter, method.source, method.noising)
    assert method.loss(batch)[0].item() == pytest.approx(whole.loss(batch)[0].item(), abs=1e-3)


def method_of(config: DPOConfig) -> tuple[PairMethod, Adapter]:
    adapter = load_adapter(config.model)
    prepare_policy(config, adapter)
    source = build_pair_source(config, adapter)
    reference = build_reference(config, adapter, source)
    return PairMethod(config, adapter, source, GaussianNoising(adapter), reference=reference), adapter


# -- the file --------------------------------------------------------------------------------------------------------


KEYS = ["row 0", "row 1", "row 4"]
DRAWS = FixedDraws(0, 2)


def memory(folder: Path, **facts: Any) -> ErrorMemory:
    return ErrorMemory(folder, {"seed": 0, **facts}, KEYS, DRAWS, torch.device("cpu"))


def known(memory: ErrorMemory) -> list[int]:
    return [slot for slot, is_known in enumerate(memory.known) if is_known]


@pytest.fixture
def saved(tmp_path: Path) -> ErrorMemory:
    """Slots 0 and 3 are known and written."""
    saved = memory(tmp_path)
    saved.learn([0, 3], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    saved.save()
    return saved


def test_errors_read_back_equal(saved: ErrorMemory, tmp_path: Path) -> None:
    again = memory(tmp_path)
    assert known(again) == [0, 3]
    assert again.recall([3, 0]).tolist() == [[2, 1], [4, 3]]


def test_a_slot_is_that_of_pair_and_draw(saved: ErrorMemory) -> None:
    seeds = torch.tensor([DRAWS.of_draw("row 4", 1), DRAWS.of_draw("row 0", 0)])
    assert saved.slots(["row 4", "row 0"], seeds) == [5, 0]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: path.write_bytes(b""),
        lambda path: save_file({"other": torch.zeros(2)}, path),
    ],
    ids=["bit", "torn", "empty", "foreign"],
)
def test_a_damaged_file_is_passed_over_and_written_anew(
    damage: Callable[[Path], Any], saved: ErrorMemory, tmp_path: Path
) -> None:
    damage(saved.path)
    with pytest.warns(UserWarning, match=rf"{saved.path.name} is skipped, its errors are computed again"):
        again = memory(tmp_path)
    assert known(again) == []
    again.learn([5], torch.tensor([[5.0], [6.0]]))
    with pytest.warns(UserWarning, match="is skipped"):
        again.save()
    assert known(memory(tmp_path)) == [5]


def test_a_file_of_other_facts_is_passed_over(saved: ErrorMemory, tmp_path: Path) -> None:
    saved.path.rename(memory(tmp_path, seed=1).path)
    with pytest.warns(UserWarning, match="its checksum or settings do not match"):
        assert known(memory(tmp_path, seed=1)) == []


def test_runs_side_by_side_keep_each_others_errors(tmp_path: Path) -> None:
    first, second = memory(tmp_path), memory(tmp_path)
    first.learn([0, 3], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    second.learn([5], torch.tensor([[5.0], [6.0]]))
    first.save()
    second.save()
    assert known(memory(tmp_path)) == [0, 3, 5]


def test_an_error_that_is_no_number_is_not_remembered(tmp_path: Path) -> None:
    broken = memory(tmp_path)
    broken.learn([0, 1], torch.tensor([[torch.nan, 2.0], [3.0, 4.0]]))
    broken.save()
    assert known(broken) == known(memory(tmp_path)) == [1]


@pytest.fixture(scope="module")
def adapter(config: DPOConfig) -> Adapter:
    return load_adapter(config.model)


def facts_of(config: DPOConfig, adapter: Adapter) -> dict[str, Any]:
    source = build_pair_source(config, adapter)
    assert isinstance(source, PairLoader)
    assert isinstance(source.examples, CachedPairs)
    return facts(config, adapter, source.examples)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"noise_draws": 3},
        {"min_timestep": 500},
        {"caption_dropout": 0.0},
        {"mixed_precision": "bf16"},
        {"weight_dtype": "bf16"},
        {"max_pairs": 3},
        {"random_flip": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_setting_that_errors_depend_on_has_another_file(
    changes: dict[str, Any], config: DPOConfig, adapter: Adapter, tmp_path: Path
) -> None:
    other = replace(config, **changes)
    if {"max_pairs", "random_flip"} & set(changes):  # another cache of latents
        other = replace(other, cache_dir=str(tmp_path / "cache"))
    assert facts_of(other, adapter) != facts_of(config, adapter)


def test_losses_and_optimisers_share_a_file(config: DPOConfig, adapter: Adapter) -> None:
    other = replace(config, beta=1.0, loss_type="ipo", learning_rate=1.0, max_steps=9, per_device_train_batch_size=2)
    assert facts_of(other, adapter) == facts_of(config, adapter)


def test_a_trained_policy_keeps_the_file_and_another_base_does_not(config: DPOConfig) -> None:
    adapter = load_adapter(config.model)
    before = facts_of(config, adapter)
    prepare_policy(config, adapter)
    for parameter in adapter.trainable_parameters().values():
        parameter.data += 1
    assert facts_of(config, adapter) == before
    with torch.no_grad():
        adapter.unet.conv_in.bias += 1e-3
    assert facts_of(config, adapter) != before


# -- draws -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def examples(pairs_folder: Path) -> PixelExamples:
    pairs: Any = load_pairs(pairs_folder)
    return PixelExamples(pairs, PairTransform(64, random_crop=True))


def visits(examples: PixelExamples, draws: FixedDraws | None, batch: int, **options: Any) -> dict[tuple[str, int], Any]:
    """Pixels and caption of every (pair, seed) in 96 visits; equal ones must be equal throughout."""
    seen: dict[tuple[str, int], Any] = {}
    for loaded in islice(PairLoader(examples, batch, draws=draws, caption_dropout=0.4, **options), 96 // batch):
        assert loaded.pixels is not None
        for i, (key, seed) in enumerate(zip(loaded.keys, loaded.seeds.tolist(), strict=True)):
            pixels, caption = seen.setdefault((key, seed), (loaded.pixels[:, i], loaded.captions[i]))
            assert torch.equal(pixels, loaded.pixels[:, i])
            assert caption == loaded.captions[i]
    return seen


def test_a_pair_meets_its_draws_and_no_other_with_the_same_picture(examples: PixelExamples) -> None:
    seen = visits(examples, FixedDraws(0, 2), 4)
    assert len(seen) == 24
    assert set(Counter(key for key, _ in seen).values()) == {2}
    assert {caption is None for _, caption in seen.values()} == {True, False}


def test_draws_do_not_depend_on_batches_or_processes(examples: PixelExamples) -> None:
    whole = visits(examples, FixedDraws(0, 2), 12)
    assert visits(examples, FixedDraws(0, 2), 8).keys() == whole.keys()
    assert visits(examples, FixedDraws(0, 2), 4, rank=1, world_size=2).keys() <= whole.keys()


def test_fresh_noise_never_comes_again(examples: PixelExamples) -> None:
    assert len(visits(examples, None, 4)) == 96


def test_a_seed_names_its_draw() -> None:
    draws = FixedDraws(7, 4)
    assert [draws.which("row 3", draws.of_draw("row 3", i)) for i in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"row 2: seed .* is none of the 4 draws of run seed 7"):
        draws.which("row 2", draws.of_draw("row 3", 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_draws": None}, "reference_cache needs noise_draws, e.g. 8"),
        ({"cache_dir": None}, "reference_cache needs cache_dir"),
        ({"loss_type": "mapo"}, "reference_cache has nothing to remember: loss_type mapo has no reference"),
        (
            {"cache_dir": None, "reference_cache": False, "streaming": True},
            "noise_draws needs .* set streaming to false",
        ),
        ({"noise_draws": 0}, "noise_draws = 0 is wrong"),
    ],
)
def test_settings_that_cannot_be_remembered_are_refused(
    changes: dict[str, Any], message: str, config: DPOConfig, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(replace(config, **{"reference_cache": True, "output_dir": str(tmp_path / "run"), **changes}))


def test_noise_that_follows_the_policy_cannot_be_remembered(config: DPOConfig, tmp_path: Path) -> None:
    save_config(InPOConfig(**vars(replace(config, reference_cache=True))), tmp_path / "inpo.yaml")
    with pytest.raises(ValueError, match=r"inpo\.yaml: reference_cache cannot be used with inversion_model policy"):
        load_config(InPOConfig, tmp_path / "inpo.yaml")
