"""``diffusion-align generate``: prompts in, PNG files out, each with a record of how it was made."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion_align.adapters import Adapter
from diffusion_align.adapters.policy_files import lora_hashes, told_name
from diffusion_align.data import load_prompts
from diffusion_align.data.holes import Holes, cropped_mask
from diffusion_align.data.transforms import crop
from diffusion_align.devices import pick_device
from diffusion_align.evaluation.figures import schedule_figure
from diffusion_align.files import check_free, check_writable, naming, write_whole
from diffusion_align.guidance.annealing import AnnealingGuidance, AnnealingSchedule
from diffusion_align.guidance.contrastive import ContrastiveGuidance
from diffusion_align.guidance.dynamic import DynamicGuidance
from diffusion_align.guidance.schedules import ScheduleGuidance, TableGuidance
from diffusion_align.pictures import decoded_mask, decoded_picture
from diffusion_align.rewards import RewardScorer, load_scorer
from diffusion_align.sampling.control import GuidedCallback, SamplingOptions, SkippedLayers
from diffusion_align.sampling.infotext import Infotext, SamplerTold
from diffusion_align.sampling.named import named_scheduler
from diffusion_align.sampling.sampler import sample, to_uint8
from diffusion_align.sampling.steering import best_of_n, fk_steering, reward_gradient

from .console import conclude
from .opening import evaluator_for, open_contrastive, say_what_is_cut
from .options import GenerateOptions


def build_guider(options: GenerateOptions) -> Any:
    """The guider that the options ask for.

    Raises:
        ValueError, FileNotFoundError: a list without --scales, a replay without --schedule, or what the guider refuses.
    """
    kind, stop = options.guidance, options.guidance_stop
    if kind == "dynamic":
        return DynamicGuidance(
            evaluator_for(options.model, options.evaluator), options.evaluators, options.candidates, options.weighting,
            pixel_scorers=options.pixel_scorers, stop=stop, fallback=options.guidance_scale if stop == 1 else 1.0,
        )  # fmt: skip
    if kind == "replay":
        if options.schedule is None:
            raise ValueError("--guidance replay needs --schedule, the .json record of a picture")
        return TableGuidance.from_record(options.schedule)
    if kind == "list":
        if len(options.scales) != options.num_inference_steps:
            raise ValueError(
                f"--guidance list needs --scales, one per step: {len(options.scales)} scales for "
                f"--num-inference-steps {options.num_inference_steps}"
            )
        return TableGuidance(list(options.scales), stop=stop)
    if kind == "annealing":
        return AnnealingGuidance(stop=stop).use(AnnealingSchedule.load(options.schedule or ""))
    if kind == "contrastive":
        return ContrastiveGuidance(options.guidance_scale, stop)
    if kind == "interval":
        low, high = options.sigma_interval
        return ScheduleGuidance(options.guidance_scale, sigma_low=low, sigma_high=high, stop=stop)
    return ScheduleGuidance(options.guidance_scale, kind, options.power, stop=stop)


def from_record(options: GenerateOptions) -> GenerateOptions:
    """For a replay without a prompt: prompt, seed, steps and size of the recorded picture.

    Raises:
        ValueError, FileNotFoundError: the record cannot be read.
    """
    if options.guidance != "replay" or options.schedule is None or options.prompt or options.prompts:
        return options
    TableGuidance.from_record(options.schedule)
    record = json.loads(Path(options.schedule).read_text())
    kept = {
        name: record[name] for name in ("prompt", "seed", "num_inference_steps", "height", "width") if name in record
    }
    if "prompt" not in kept:
        raise ValueError(f"{options.schedule}: it has no prompt; give one with --prompt")
    return replace(options, num_images=1, **kept)


def draw(
    adapter: Adapter, options: GenerateOptions, guider: Any, scorer: RewardScorer | None,
    prompts: Sequence[str], seeds: Sequence[int], hole: Holes | None, on_guided: GuidedCallback | None = None,
) -> tuple[torch.Tensor, list[dict[str, Any]]]:  # fmt: skip
    """Images (B, 3, H, W) in [0, 1] of one batch, and the record of each; ``on_guided`` measures the guider."""
    scheduler = named_scheduler(adapter, options.scheduler)
    negative = options.negative_prompt
    copies = options.particles if options.search in ("best-of-n", "fk") else 1
    skipped = SkippedLayers(
        options.skip_guidance_layers, options.skip_layer_guidance_scale, options.skip_layer_guidance_start,
        options.skip_layer_guidance_stop,
    )  # fmt: skip
    if not skipped.layers and skipped != SkippedLayers(()):
        raise ValueError("skip_layer_guidance_scale, _start and _stop need --skip-guidance-layers")
    sampling = SamplingOptions(
        height=options.height,
        width=options.width,
        batch_size=options.batch_size,
        alignment_strength=options.alignment_strength,
        embedded_guidance=options.embedded_guidance,
        skipped_layers=skipped if skipped.layers else None,
        on_guided=on_guided,
    )
    common: dict[str, Any] = {
        "num_inference_steps": options.num_inference_steps,
        "guidance": guider,
        "scheduler": scheduler,
        "inpaint": None if hole is None else encode_hole(adapter, hole).repeat(len(prompts) * copies, 1, 1, 1),
        "negative_prompts": None if negative is None else [negative] * len(prompts) * copies,
    }
    if scorer is None or options.search == "gradient":
        strength = options.steering_strength
        callback = scorer and reward_gradient(adapter, prompts, scorer, 0.1 if strength is None else strength)
        samples = sample(adapter, prompts, seeds=seeds, options=replace(sampling, callback=callback), **common)
        return samples.images, [{**record, "nfe": samples.nfe} for record in samples.records or [{} for _ in prompts]]
    if options.search == "fk":
        strength = 10.0 if options.steering_strength is None else options.steering_strength
        steered = fk_steering(
            adapter, prompts, scorer, options.particles, seeds=seeds, strength=strength, options=sampling, **common
        )
    else:
        steered = best_of_n(adapter, prompts, scorer, options.particles, seeds=seeds, options=sampling, **common)
    facts = {"nfe": steered.nfe, "reward_calls": steered.reward_calls}
    return steered.images, [
        {**facts, "reward": reward, "choice": choice}
        for reward, choice in zip(steered.reward.tolist(), steered.choice.tolist(), strict=True)
    ]


def load_hole(adapter: Adapter, options: GenerateOptions) -> Holes | None:
    """``--image`` and ``--mask`` at the size that is drawn; None for models that do not inpaint.

    Raises:
        ValueError: they are missing for an inpainting model, given for another, differ in size, are no pictures, or
            the mask marks nothing or everything.
        FileNotFoundError: a file that is not there.
    """
    given = (options.image is not None) + (options.mask is not None)
    if given != (2 if adapter.is_inpainting else 0):
        raise ValueError(
            f"{options.model} is an inpainting model: generate needs --image and --mask"
            if adapter.is_inpainting
            else f"--image and --mask are for inpainting models, {options.model} is not one"
        )
    if options.image is None or options.mask is None:
        return None
    picture = decoded_picture(Path(options.image), f"--image {options.image}")
    mask = decoded_mask(Path(options.mask), f"--mask {options.mask}")
    if picture.size != mask.shape[::-1]:
        raise ValueError(
            f"--mask {options.mask} is {mask.shape[::-1]}, --image {options.image} is {picture.size} pixels"
        )
    size = (options.height or adapter.default_resolution, options.width or adapter.default_resolution)
    pixels, _ = crop(picture, size, 0.5, 0.5, flip=False)
    hole = cropped_mask(mask, size, f"--mask {options.mask}")
    return Holes([""], ((pixels + 1) / 2)[None], hole[None, None])


@torch.no_grad()
def encode_hole(adapter: Adapter, hole: Holes) -> torch.Tensor:
    """What the UNet sees of the hole, (1, 1 + C, h, w)."""
    return adapter.encode_inpaint(hole.pictures.to(adapter.device) * 2 - 1, hole.masks.to(adapter.device)).float()


def generate_files(options: GenerateOptions) -> list[Path]:
    """Draw every prompt ``num_images`` times; returns the PNG files.

    Each PNG's ``diffusion-align`` text chunk holds prompt, seed and options, ``parameters`` what A1111 would write of
    it. Beside it lies a .json record with the
    scales of every step (which ``--guidance replay`` repeats), the denoiser calls, and for dynamic guidance every
    candidate's scores, with a plot of them in ``schedules/``.

    Raises:
        ValueError, FileNotFoundError, OSError: prompts, model, weights or settings that cannot be used, or a picture of
            the same name that is there already.
    """
    options = from_record(options)
    prompts = [options.prompt] if options.prompt is not None else load_prompts(options.prompts or "")
    if options.search != "none" and options.scorer is None:
        raise ValueError(f"--search {options.search} needs --scorer")
    jobs = [(prompt, options.seed + i) for prompt in prompts for i in range(options.num_images)]
    folder = Path(options.out)
    check_free([picture_path(folder, number, job) for number, job in enumerate(jobs)], options.overwrite)
    guider = build_guider(options)
    check_writable(folder)
    device = pick_device(options.device)
    adapter = open_contrastive(options, device, options.negative_lora, options.negative_keep, options.negative_merge)
    say_what_is_cut(adapter, prompts)
    hole = load_hole(adapter, options)
    scorer = None if options.search == "none" else load_scorer(str(options.scorer)).to(device)
    written, writer = [], PictureWriter.of(adapter, options)
    # One batch at a time, so that the pictures of a long list appear, and stay, as they are drawn.
    for start in range(0, len(jobs), options.batch_size):
        batch = jobs[start : start + options.batch_size]
        images, told = draw(adapter, options, guider, scorer, [p for p, _ in batch], [s for _, s in batch], hole)
        if hole is not None:  # outside the hole the picture stays as it is, to the bit
            images = torch.where(hole.masks > 0.5, images, hole.pictures)
        for i, (job, pixels, facts) in enumerate(zip(batch, to_uint8(images), told, strict=True), start=start):
            written.append(writer.write(folder, i, job, pixels, facts))
    return written


@dataclass(frozen=True)
class PictureWriter:
    """Writes pictures with how they were made.

    Attributes:
        options: what one model draws with.
        sampler: as A1111 calls it.
        loras: A1111's hashes, by name.
    """

    options: GenerateOptions
    sampler: SamplerTold
    loras: Mapping[str, str]

    @classmethod
    def of(cls, adapter: Adapter, options: GenerateOptions) -> PictureWriter:
        """Of what ``adapter`` draws with ``options``."""
        scheduler = named_scheduler(adapter, options.scheduler) or adapter.pipeline.scheduler
        used = options.lora if options.alignment_strength else ()
        return cls(options, SamplerTold.of(scheduler), lora_hashes(used))

    def write(self, folder: Path, number: int, job: tuple[str, int], pixels: Any, facts: dict[str, Any]) -> Path:
        """One PNG with its record and, if its scales were searched, their plot; returns the PNG."""
        (prompt, seed), path = job, picture_path(folder, number, job)
        settings = {**asdict(self.options), "prompt": prompt, "seed": seed}
        chunk = PngInfo()
        chunk.add_text("diffusion-align", json.dumps(settings))
        chunk.add_text("parameters", self.infotext(job, pixels, facts).text())
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", pnginfo=chunk)
        write_whole(path, buffer.getvalue())
        write_whole(path.with_suffix(".json"), json.dumps({**settings, **facts}).encode() + b"\n")
        if "scores" in facts:
            plot = path.parent / "schedules" / path.name  # a folder of pictures holds pictures only
            with naming(plot):
                plot.parent.mkdir(exist_ok=True)
                schedule_figure(facts, prompt).savefig(plot, dpi=110)
        return path

    def infotext(self, job: tuple[str, int], pixels: Any, facts: Mapping[str, Any]) -> Infotext:
        """For other programs; where the scale changes from step to step it is the mean."""
        prompt, seed = job
        scales = facts.get("scales") or [self.options.guidance_scale]
        return Infotext(
            prompt=prompt, negative_prompt=self.options.negative_prompt or "",
            steps=self.options.num_inference_steps, sampler=self.sampler, scale=sum(scales) / len(scales), seed=seed,
            size=(pixels.shape[1], pixels.shape[0]), model=told_name(self.options.model),
            loras=self.loras,
        )  # fmt: skip


def picture_path(folder: Path, number: int, job: tuple[str, int]) -> Path:
    """Where the picture of a prompt and a seed goes."""
    prompt, seed = job
    return folder / f"{number:05d}-{slug(prompt)}-{seed}.png"


def slug(text: str, limit: int = 48) -> str:
    """A file name's worth of ``text``."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:limit].rstrip("-") or "image"


def run(options: GenerateOptions) -> int:
    """Draw the images and print their files; returns the exit status."""
    written = [str(path) for path in generate_files(options)]
    conclude("\n".join(written), {"pictures": written})
    return 0
