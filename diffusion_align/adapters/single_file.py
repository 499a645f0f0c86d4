"""What a single checkpoint file holds, by the names and shapes of its tensors; no tensor is read for it.

The layout is that of CompVis (Stable Diffusion 1.x, 2.x), of Stability's generative-models (SDXL) and of the original
SD3 and FLUX checkpoints, of which the denoiser is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

NETWORK = "model.diffusion_model."
FIRST, LAST = NETWORK + "input_blocks.0.0.weight", NETWORK + "out.2.weight"
#: Text encoders: CLIP in transformers' names, OpenCLIP in its own.
SD1_TEXT, SD2_TEXT = "cond_stage_model.transformer.", "cond_stage_model.model."
SDXL_TEXT, REFINER_TEXT = "conditioner.embedders.1.model.", "conditioner.embedders.0.model."
#: What SDXL's UNet has beside SD's: the pooled prompt and the size ids.
SIZES = NETWORK + "label_emb."
#: Width of the prompt embeddings of SD 2.x, and a weight that reads them.
SD2_WIDTH, READS_PROMPT = 1024, "attn2.to_k.weight"

VELOCITY = "v_prediction"
#: Tensors that are there to say something, and what they say.
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")

#: Beginnings of names in files that are something else, and what that is. The first may stand beside a UNet.
OTHERS: tuple[tuple[str, str], ...] = (
    ("control_model.", "a ControlNet, which is no whole model"),
    (NETWORK + "double_blocks.", "a FLUX model that is not whole"),
    ("double_blocks.", "a FLUX model that is not whole"),
    (NETWORK + "joint_blocks.", "a Stable Diffusion 3 model that is not whole"),
    ("joint_blocks.", "a Stable Diffusion 3 model that is not whole"),
    ("lora_unet_", "a LoRA: give it as --lora, and its base as --model"),
    ("unet.", "a LoRA: give it as --lora, and its base as --model"),
    ("down_blocks.", "a UNet in diffusers' layout, without the rest of a pipeline: give the pipeline's folder"),
    ("encoder.", "an autoencoder: give it as --vae, and its model as --model"),
    ("text_model.", "a text encoder, which is no whole model"),
)

#: Published configs of what a file holds, for who gives none.
CONFIGS: Mapping[str, str] = {
    "sd": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd-inpaint": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "sd2": "stabilityai/stable-diffusion-2-1-base",
    "sd2-v": "stabilityai/stable-diffusion-2-1",
    "sd2-inpaint": "stabilityai/stable-diffusion-2-inpainting",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sdxl-inpaint": "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd35-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd35-large": "stabilityai/stable-diffusion-3.5-large",
    "flux": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
}
#: Blocks of SD3.5 large; of the others there are 24.
LARGE = 38

#: Of SD 2.x's last attention block, the bias of the first norm. The files of the two kinds have the same names and
#: shapes. In those that predict v the bias is spread wider (ComfyUI tells them apart by the same number).
V_SPREAD, SPREAD_OF = 0.09, NETWORK + "output_blocks.11.1.transformer_blocks.0.norm1.bias"


@dataclass(frozen=True)
class SingleFile:
    """What a file holds.

    Attributes:
        family: a name of ``pipeline_classes``.
        channels: what the UNet takes.
        configs: hub name of published configs for it.
        prediction_type: what its markers say; None where they say nothing.
        network_alone: whether only the denoiser is read from it, and the rest from the configs' folder.
        zero_snr: whether its noise schedule was rescaled to end in pure noise (2305.08891).
    """

    family: str
    channels: int
    configs: str
    prediction_type: str | None = None
    zero_snr: bool = False
    network_alone: bool = False


def read_single_file(path: Path) -> SingleFile:
    """Recognise a checkpoint.

    Raises:
        ValueError: no ``.safetensors`` file, a torn one, or one that holds something else than a whole Stable Diffusion
            or SDXL model; the message says what it holds.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: only .safetensors checkpoints are read (pickled .ckpt files can run code)")
    try:
        with safe_open(str(path), framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return recognise(str(path), shapes, file.metadata() or {}, file.get_tensor)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole .safetensors file ({error})") from None


def recognise(
    name: str, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], tensor: Callable[[str], Any]
) -> SingleFile:
    """As ``read_single_file``, from the file's header.

    Args:
        name: of the file, for messages.
        shapes: of its tensors.
        metadata: its texts, of which ``modelspec.prediction_type`` is read.
        tensor: reads one tensor.
    """
    flow = flow_model(shapes)
    if flow is not None:
        return flow
    check_contents(name, shapes)
    family = base_family(name, shapes)
    channels, latents = shapes[FIRST][1], shapes[LAST][0]
    if channels not in (latents, 2 * latents + 1):
        raise ValueError(
            f"{name}: its UNet takes {channels} channels; expected {latents}, or {2 * latents + 1} of an inpainting "
            "model (models that edit, upscale or follow depth maps are not supported)"
        )
    inpaints = channels != latents
    prediction = marked_prediction(shapes, metadata)
    kind = ("sd2" if family == "sd" and is_second(shapes) else family) + ("-inpaint" if inpaints else "")
    if kind == "sd2" and (prediction or spread_prediction(shapes, tensor)) == VELOCITY:
        kind = "sd2-v"
    return SingleFile(
        family + ("-inpaint" if inpaints else ""), channels, CONFIGS[kind], prediction, ZERO_SNR in shapes
    )


def flow_model(shapes: Mapping[str, tuple[int, ...]]) -> SingleFile | None:
    """SD3, SD3.5 or FLUX.1, by the denoiser's blocks; None where there are none."""
    start = NETWORK if any(key.startswith(NETWORK) for key in shapes) else ""
    patches, packed = f"{start}x_embedder.proj.weight", f"{start}img_in.weight"
    if f"{start}joint_blocks.0.x_block.attn.qkv.weight" in shapes and patches in shapes:
        large = f"{start}joint_blocks.{LARGE - 1}.x_block.attn.qkv.weight" in shapes
        medium = any(".attn2." in key for key in shapes)
        kind = "sd35-large" if large else "sd35-medium" if medium else "sd3"
        return SingleFile("sd3", shapes[patches][1], CONFIGS[kind], network_alone=True)
    if f"{start}double_blocks.0.img_attn.qkv.weight" in shapes and packed in shapes:
        kind = "flux" if f"{start}guidance_in.in_layer.weight" in shapes else "flux-schnell"
        return SingleFile("flux", shapes[packed][1], CONFIGS[kind], network_alone=True)
    return None


def check_contents(name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse by name what is no Stable Diffusion UNet in the original layout, or has another noising process."""
    missing = [key for key in (FIRST, LAST) if key not in shapes]
    others = OTHERS if missing else OTHERS[:1]
    for start, what in others:
        if any(key.startswith(start) for key in shapes):
            raise ValueError(f"{name} holds {what}")
    if missing:
        some = ", ".join(list(shapes)[:3]) or "nothing"
        raise ValueError(f"{name} is no Stable Diffusion checkpoint: {missing[0]} is missing (it holds {some}, ...)")
    edm = [key for key in EDM if key in shapes]
    if edm:
        raise ValueError(f"{name} holds {edm[0]}: it was trained on EDM's noising process, which is not supported")


def base_family(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """ "sd" or "sdxl", by the text encoders, or by the UNet where the file has none."""

    def has(start: str) -> bool:
        return any(key.startswith(start) for key in shapes)

    if has(REFINER_TEXT) and not has(SDXL_TEXT):
        raise ValueError(f"{name} is SDXL's refiner, which is not supported: expected a base model")
    if has(SDXL_TEXT):
        return "sdxl"
    if has("conditioner."):
        key = next(key for key in shapes if key.startswith("conditioner."))
        raise ValueError(f"{name}: its conditioner is not understood ({key})")
    if has(SD1_TEXT) or has(SD2_TEXT):
        if has(SIZES):
            raise ValueError(f"{name}: {SIZES}* is not understood beside Stable Diffusion's text encoder (unCLIP?)")
        return "sd"
    return "sdxl" if has(SIZES) else "sd"


def is_second(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether an SD file is of 2.x: OpenCLIP's text encoder, or its width where the file has none."""
    if any(key.startswith((SD1_TEXT, SD2_TEXT)) for key in shapes):
        return any(key.startswith(SD2_TEXT) for key in shapes)
    return any(key.endswith(READS_PROMPT) and shape[-1] == SD2_WIDTH for key, shape in shapes.items())


def marked_prediction(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> str | None:
    """What the marker tensor or the metadata (Stability's ModelSpec) say that the network predicts."""
    if V_PREDICTION in shapes:
        return VELOCITY
    return {"v": VELOCITY, "epsilon": "epsilon"}.get(metadata.get("modelspec.prediction_type", ""))


def spread_prediction(shapes: Mapping[str, tuple[int, ...]], tensor: Callable[[str], Any]) -> str:
    """What an SD 2.x file without markers predicts, by its weights: 768-v or base."""
    if SPREAD_OF in shapes and float(tensor(SPREAD_OF).float().std(correction=0)) > V_SPREAD:
        return VELOCITY
    return "epsilon"
