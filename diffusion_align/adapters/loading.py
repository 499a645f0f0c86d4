"""From a name to an adapter: hub repository, local folder, single checkpoint file, or a shipped scenes pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, EulerDiscreteScheduler
from torch import nn

from diffusion_align.files import verify_folder
from diffusion_align.names import hint
from diffusion_align.process import OUTPUTS, is_flow
from diffusion_align.quiet import no_loading_bars
from diffusion_align.shipped import LAYOUTS, PUBLISHED_LAYOUTS, SHIPPED_MODELS, shipped_path

from .adapter import Adapter
from .autoencoder import check_vae_batch_size, stored_dtype
from .families import DENOISERS, Family, matching_family, pipeline_classes
from .parts import NEVER, PARTS, Part, check_whole, class_of, find_variants, skeleton
from .single_file import SingleFile, read_single_file

#: Field of a model_index.json: how many tokens T5 is given, where it is not the pipeline's own number.
LENGTH_FIELD = "_max_sequence_length"


@dataclass(frozen=True)
class Source:
    """Where a pipeline's configs are, and what they say.

    Attributes:
        name: folder or hub name.
        index: its model_index.json.
        network: config of its denoiser.
        family: which model it is.
        revision: of a hub name.
    """

    name: str
    index: Mapping[str, Any]
    network: Mapping[str, Any]
    family: Family
    revision: str | None = None

    @classmethod
    def read(cls, name: str, what: str, revision: str | None = None) -> Source:
        """Read the configs; no weight is.

        Raises:
            ValueError: no family that is supported; the message starts with ``what`` and the pipeline's class.
            OSError: they can be found neither locally nor on the hub.
        """
        where = {} if revision is None else {"revision": revision}
        index = DiffusionPipeline.load_config(name, **where)
        network: Mapping[str, Any] = {}
        for part in DENOISERS:
            if (index.get(part) or [None])[0] is not None:
                kind: Any = class_of(index[part])
                network = kind.load_config(name, subfolder=part, **where)
        family = matching_family(index, network, f"{what} ({index['_class_name']})")
        return cls(name, index, network, family, revision)

    def names(self, parts: Collection[Part]) -> frozenset[str]:
        """Names of these parts in the pipeline."""
        known = {"network": (self.family.network_name,), "vae": ("vae",)}
        return frozenset(
            name
            for part in parts
            for name in known.get(part, self.family.text_encoder_names)
            if (self.index.get(name) or [None])[0] is not None
        )

    def skeletons(self, parts: Collection[Part]) -> dict[str, nn.Module]:
        """These parts without weights, by name."""
        return {
            name: skeleton(class_of(self.index[name]), self.name, name, self.revision) for name in self.names(parts)
        }


@dataclass(frozen=True)
class Wanted:
    """What is to be read of a pipeline.

    Attributes:
        dtype: of its parts.
        network_dtype: of its denoiser.
        variant: of the weight files of a folder or hub name.
        vae: another autoencoder.
        absent: parts that are not read.
        bf16_instead: whether bf16 takes the place of fp16 where that is too small.
    """

    dtype: torch.dtype
    network_dtype: torch.dtype
    variant: str | None
    vae: str | None
    absent: Collection[Part]
    bf16_instead: bool = False

    def fitted(self, source: Source) -> Wanted:
        """In precisions that the family's networks stay within.

        Raises:
            ValueError: fp16 where they do not, and bf16 may not take its place.
        """
        if not source.family.overflows or torch.float16 not in (self.dtype, self.network_dtype):
            return self
        if not self.bf16_instead:
            raise ValueError(f"{source.name}: a {source.family.name} model leaves the range of fp16: take bf16 or fp32")
        return replace(self, dtype=torch.bfloat16, network_dtype=torch.bfloat16)

    def dtypes(self, source: Source) -> dict[str, torch.dtype]:
        """Of the parts by name that are not read in ``dtype``. A VAE that stays float32 must not be rounded on its
        way there."""
        return {"vae": torch.float32, source.family.network_name: self.network_dtype}

    def given(self, source: Source) -> dict[str, Any]:
        """Arguments for diffusers: parts that it need not read, None for those that nothing needs."""
        parts: dict[str, Any] = dict(source.skeletons(self.absent))
        if self.vae is not None and "vae" not in parts:
            parts["vae"] = _load_vae(self.vae, source)
        if "safety_checker" in source.index:
            parts["requires_safety_checker"] = False
        # Diffusers asks to be told of parts that the folder says are missing: SD3 without T5.
        missing = {name for name, part in source.index.items() if isinstance(part, list) and part[:1] == [None]}
        return parts | dict.fromkeys(missing | {name for name in NEVER if name in source.index})


def load_adapter(
    model: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    variant: str | None = None,
    revision: str | None = None,
    vae: str | None = None,
    config: str | None = None,
    family: str | None = None,
    prediction_type: str | None = None,
    vae_batch_size: int | None = None,
    vae_tiling: bool = False,
    network_dtype: torch.dtype | None = None,
    max_sequence_length: int | None = None,
    bf16_instead: bool = False,
    parts: Collection[Part] = PARTS,
) -> Adapter:
    """Load a Stable Diffusion 1.x/2.x, SDXL, inpainting, SD3, SD3.5, FLUX.1 or AuraFlow pipeline.

    Safety checkers are never loaded.

    Args:
        model: a shipped name ("scenes-sdxl"), a folder with ``model_index.json``, a single ``.safetensors`` checkpoint
            (the layout of CompVis and Stability), or a hub name ("stabilityai/stable-diffusion-xl-base-1.0").
        dtype: of the UNet, text encoders and VAE. SDXL's VAE overflows in half precision: it is float32, unless its
            config says ``force_upcast: false``.
        variant: of the weight files ("fp16"). None takes those without a name. Where a folder has one variant only,
            that one is read, with a warning if another one was asked for.
        revision: of a hub name, as in ``from_pretrained``.
        vae: another autoencoder: folder, hub name ("madebyollin/sdxl-vae-fp16-fix") or single ``.safetensors`` file.
        config: for a single file, a folder or hub name with the pipeline's configs and tokenizers (needed offline).
        family: for a single file, one of "sd", "sdxl", "sd-inpaint", "sdxl-inpaint"; None recognises it by its tensors.
        prediction_type: "epsilon", "v_prediction" or "sample", instead of what the scheduler's config says (in a single
            file also the marker tensor ``v_pred``).
        vae_batch_size, vae_tiling: as in ``Adapter.code_in_chunks``.
        network_dtype: of the denoiser alone, where it is not ``dtype``.
        max_sequence_length: tokens that T5 is given, of SD3, FLUX and AuraFlow; None is what the folder's
            ``model_index.json`` says (``_max_sequence_length``), else the pipeline's own (256; FLUX 512, schnell 256).
            Another one than the model was trained with makes other pictures.
        bf16_instead: where fp16 is asked for and the model leaves its range (FLUX), take bf16 instead of refusing.
        parts: what is loaded; of the others only the configs are there, and what needs their weights is an error.

    Raises:
        FileNotFoundError: ``model`` looks like a path but nothing is there, or the folder has no model_index.json.
        OSError: a hub name that cannot be downloaded, or weights that are not there; the message says what to do.
        ValueError: a model that is not supported or not the ``family`` that was given, another ``prediction_type``
            than those above, a part that is not understood, a file that has changed since ``export`` wrote it, or
            ``vae_batch_size`` below 1.
    """
    check_vae_batch_size(vae_batch_size)
    if prediction_type not in (None, *OUTPUTS):
        raise ValueError(f"prediction_type {prediction_type!r}: expected one of {', '.join(OUTPUTS)}")
    absent = PARTS - set(parts)
    wanted = Wanted(dtype, network_dtype or dtype, variant, vae, absent, bf16_instead)
    path = Path(shipped_path(str(model)) if str(model) in SHIPPED_MODELS else model)
    with no_loading_bars() if path.exists() else nullcontext():  # a download's are worth seeing
        if path.is_file():
            pipeline = _load_single_file(path, config, family, wanted)
        else:
            source = _find_pipeline(str(path) if path.is_dir() else str(model), family, revision)
            pipeline = _load_pipeline(source, wanted)
    if prediction_type is not None:
        pipeline.scheduler = rescheduled(pipeline.scheduler, prediction_type, False)
    told = pipeline.config.get(LENGTH_FIELD) if max_sequence_length is None else max_sequence_length
    adapter = Adapter(pipeline, absent, told)
    stored = stored_dtype(dtype, adapter.family.vae_overflows, adapter.vae.config.force_upcast)
    nn.Module.to(adapter.vae, stored)  # diffusers' own .to warns of an empty list of modules
    return adapter.code_in_chunks(vae_batch_size, vae_tiling).to(device)


def rescheduled(scheduler: Any, prediction_type: str | None, zero_snr: bool) -> Any:
    """``scheduler`` for a network that predicts ``prediction_type``, None: as it says itself.

    Args:
        zero_snr: whether the schedule is rescaled to end in pure noise (2305.08891), where sampling then starts.
            Schedulers that cannot be rescaled (PNDM) give way to Euler's.

    Raises:
        ValueError: a flow model, which predicts the flow.
    """
    if prediction_type is not None and is_flow(scheduler):
        raise ValueError(
            f"prediction_type {prediction_type}: this model is of flow matching and predicts the flow: leave it unset"
        )
    changes: dict[str, Any] = {} if prediction_type is None else {"prediction_type": prediction_type}
    kind: Any = type(scheduler)
    if zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        can_be = "rescale_betas_zero_snr" in inspect.signature(kind.__init__).parameters
        kind = kind if can_be else EulerDiscreteScheduler
    return kind.from_config(scheduler.config, **changes) if changes else scheduler


def _find_pipeline(name: str, family: str | None, revision: str | None) -> Source:
    path = Path(name)
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise FileNotFoundError(f"{path} is no diffusers pipeline: expected a model_index.json in it")
    if name in LAYOUTS and not path.is_dir():
        raise FileNotFoundError(_no_weights("model", name))
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or name.count("/") != 1):
        shipped = ", ".join(SHIPPED_MODELS)
        raise FileNotFoundError(
            f"model {name!r} not found{hint(name, SHIPPED_MODELS)}: "
            "expected a pipeline folder, a .safetensors file, a hub name such as "
            f"'stabilityai/stable-diffusion-xl-base-1.0', or one of: {shipped}"
        )
    try:
        source = Source.read(name, name, revision)
    except OSError as error:
        raise OSError(_advice(name, error)) from error
    _check_family(name, family)
    if family is not None and family not in source.family.pipelines:
        raise ValueError(f"{name} is of family {source.family.name!r}, but family {family!r} was given")
    return source


def _load_pipeline(source: Source, wanted: Wanted, network: nn.Module | None = None) -> Any:
    """The pipeline of a folder or hub name, with its own denoiser or another one."""
    wanted = wanted.fitted(source)
    given, dtypes, variant = wanted.given(source), wanted.dtypes(source), wanted.variant
    if network is not None:
        given[source.family.network_name] = network
    folder = Path(source.name)
    if folder.is_dir():
        verify_folder(folder)  # what ``export`` wrote
        variants = find_variants(folder, source.names(PARTS) - set(given), variant)
        if len(set(variants.values())) == 1:
            variant = next(iter(variants.values()))
        else:
            variant = variant if variant in variants.values() else None
            for name in [name for name, own in variants.items() if own != variant]:
                kind: Any = class_of(source.index[name])
                options = {"subfolder": name, "variant": variants[name], "dtype": dtypes.get(name, wanted.dtype)}
                given[name] = kind.from_pretrained(source.name, use_safetensors=True, **options)
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            source.name,
            variant=variant,
            revision=source.revision,
            use_safetensors=True,
            dtype={"default": wanted.dtype, **dtypes},
            **given,
        )
    except OSError as error:
        raise OSError(_advice(source.name, error)) from error
    except ValueError as error:
        if variant is None or f"variant={variant}" not in str(error):
            raise
        raise ValueError(f"{source.name}: {error} --variant None reads those without a name") from error
    if LENGTH_FIELD in source.index:  # diffusers passes over private fields
        pipeline.register_to_config(**{LENGTH_FIELD: source.index[LENGTH_FIELD]})
    return pipeline


def _advice(name: str, error: OSError) -> str:
    """What to do about a pipeline that could not be loaded."""
    if Path(name).is_dir():
        return f"{name}: {error} (weights are read from .safetensors files; --variant names another set of them)"
    return (
        f"model {name!r} could not be loaded ({error}). If it has weights of one variant only, give --variant. "
        f"Offline, download it once with 'hf download {name}' and give the folder instead"
    )


def _no_weights(setting: str, layout: str) -> str:
    """What to give in the place of the name of a layout."""
    published = next(hub for hub, name in PUBLISHED_LAYOUTS.items() if name == layout)
    return (
        f"{setting} {layout!r} names a layout, of which only configs come with the package: it is for train METHOD "
        f"--dry-run. Give a pipeline folder, a .safetensors file or a hub name, e.g. {published!r}"
    )


def _check_family(what: str, family: str | None) -> None:
    """Raise ValueError unless ``family`` is known or None."""
    if family is not None and family not in pipeline_classes():
        known = ", ".join(sorted(pipeline_classes()))
        raise ValueError(f"unknown family {family!r} for {what}: expected one of {known}")


def _load_vae(vae: str, source: Source) -> AutoencoderKL:
    """Another autoencoder, float32: from a single file (with the pipeline's own config), a folder or the hub."""
    path, read = Path(vae), AutoencoderKL
    if path.is_file():
        return read.from_single_file(str(path), config=source.name, subfolder="vae", dtype=torch.float32)
    variant = find_variants(path.parent, [path.name])[path.name] if path.is_dir() else None
    try:
        return read.from_pretrained(vae, variant=variant, use_safetensors=True, dtype=torch.float32)
    except OSError as error:
        raise OSError(f"vae {vae!r} could not be loaded ({error})") from error


def _load_single_file(path: Path, config: str | None, family: str | None, wanted: Wanted) -> Any:
    """The pipeline of a file in the layout of CompVis and Stability."""
    _check_family(str(path), family)
    if config in LAYOUTS and not Path(config).is_dir():
        raise FileNotFoundError(_no_weights("model_config", config))
    held = read_single_file(path)
    held = replace(held, family=family or held.family)
    configs = str(shipped_path(config)) if config in SHIPPED_MODELS else config or held.configs
    try:
        source = Source.read(configs, configs)
        options: dict[str, Any] = {"config": configs, "local_files_only": Path(configs).is_dir()}
        _check_configs(path, held, source)
        wanted = wanted.fitted(source)
        if held.network_alone:
            return _load_pipeline(source, wanted, _load_network(path, source, wanted, options))
        given = wanted.given(source)
        for name, dtype in wanted.dtypes(source).items():
            if name not in given and dtype != wanted.dtype:
                kind: Any = class_of(source.index[name])
                given[name] = kind.from_single_file(str(path), subfolder=name, dtype=dtype, **options)
        read: Any = pipeline_classes()[held.family]
        pipeline = read.from_single_file(str(path), dtype=wanted.dtype, **options, **given)
    except OSError as error:
        raise OSError(
            f"{path}: {error}. Its configs are read from {configs}: offline, give --model-config, a folder with the "
            "pipeline's configs and tokenizers"
        ) from error
    except NotImplementedError as error:  # diffusers moves what it did not find
        raise ValueError(f"{path} is not whole: weights of the model that {configs} describes are missing") from error
    check_whole(str(path), pipeline, source.names(wanted.absent))
    pipeline.scheduler = rescheduled(pipeline.scheduler, held.prediction_type, held.zero_snr)
    return pipeline


def _load_network(path: Path, source: Source, wanted: Wanted, options: Mapping[str, Any]) -> nn.Module | None:
    """The denoiser of a file that is read for it alone; None where it is not wanted."""
    name = source.family.network_name
    if "network" in wanted.absent:
        return None
    kind: Any = class_of(source.index[name])
    network: nn.Module = kind.from_single_file(str(path), subfolder=name, dtype=wanted.network_dtype, **options)
    lost = [key for key, value in network.named_parameters() if value.is_meta]
    if lost:
        raise ValueError(f"{path} is not whole: {len(lost)} weights of its {name} are missing, e.g. {lost[0]}")
    return network


def _check_configs(path: Path, held: SingleFile, source: Source) -> None:
    """Raise ValueError unless the configs describe what the file holds."""
    if held.family not in source.family.pipelines:
        raise ValueError(f"{path} is of family {held.family!r}, but {source.name} is of {source.family.name!r}")
    channels = source.network["in_channels"]
    if channels != held.channels:
        raise ValueError(f"{path}: its UNet takes {held.channels} channels, the one of {source.name} {channels}")
