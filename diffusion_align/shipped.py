"""What comes with the package under a name of its own, "scenes-...", and the folder where it can be read.

An asset folder may lack what another one has, and hold weights packed into few bits; its ``assembly.json`` says so:
``shared`` maps a path to "OTHER-ASSET/PATH", ``packed`` a path, stored with the ending ``.packed``, to the file that it
is a difference to, or null. Such an asset is assembled once, in a cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from .files import sha256_of, write_whole
from .names import hint

if TYPE_CHECKING:
    from torch import Tensor


#: Inpainting tasks of the embedded world, and who opens a split of them ("module:function").
SCENE_HOLES = {
    "scenes-holes": "diffusion_align.scenes.world.scene_holes:random_holes",
    "scenes-objects": "diffusion_align.scenes.world.scene_holes:object_holes",
}
#: Scorers of the embedded world that are computed, not learnt, and who opens them.
SCENE_SCORERS = {"scenes-oracle": "diffusion_align.scenes.oracle_scorer:load_oracle"}

SHIPPED_MODELS = ("scenes-sdxl", "scenes-sd", "scenes-inpaint", "scenes-uneven", "scenes-flow")
SHIPPED_PAIRS = ("scenes-pairs",)
#: LoRAs of shipped models.
SHIPPED_LORAS = ("scenes-aligned",)
SHIPPED_SCORERS = ("scenes-clip", "scenes-vp", "scenes-vp-words", "scenes-vp-inpaint", "scenes-edit", "scenes-pal")
SHIPPED_EVALUATORS = ("scenes-sdxl-evaluator", "scenes-sd-evaluator", "scenes-uneven-evaluator")
#: The evaluator that was trained on a shipped model's latents.
EVALUATOR_OF: Mapping[str, str] = MappingProxyType(
    {"scenes-sdxl": "scenes-sdxl-evaluator", "scenes-sd": "scenes-sd-evaluator",
     "scenes-uneven": "scenes-uneven-evaluator"}
)  # fmt: skip
SHIPPED = (*SHIPPED_MODELS, *SHIPPED_PAIRS, *SHIPPED_SCORERS, *SHIPPED_EVALUATORS, *SHIPPED_LORAS)

#: Published models of which the configs come with the package, without weights and vocabularies: enough for a plan.
LAYOUTS = (
    "sd15", "sd15-inpaint", "sdxl", "sdxl-inpaint", "sd3-medium", "sd35-medium", "sd35-large", "flux-dev",
    "flux-schnell",
)  # fmt: skip
#: The same by the names that the models have on the hub; the last one is an autoencoder alone.
PUBLISHED_LAYOUTS: Mapping[str, str] = MappingProxyType(
    {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
        "stable-diffusion-v1-5/stable-diffusion-inpainting": "sd15-inpaint",
        "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
        "diffusers/stable-diffusion-xl-1.0-inpainting-0.1": "sdxl-inpaint",
        "stabilityai/stable-diffusion-3-medium-diffusers": "sd3-medium",
        "stabilityai/stable-diffusion-3.5-medium": "sd35-medium",
        "stabilityai/stable-diffusion-3.5-large": "sd35-large",
        "black-forest-labs/FLUX.1-dev": "flux-dev",
        "black-forest-labs/FLUX.1-schnell": "flux-schnell",
        "madebyollin/sdxl-vae-fp16-fix": "sdxl-vae-fp16-fix",
    }
)

#: Environment variable: the folder in which assets are assembled, instead of the user's cache.
CACHE_VARIABLE = "DIFFUSION_ALIGN_CACHE"

#: Where the package stores them.
ASSETS = Path(str(resources.files("diffusion_align"))) / "scenes" / "assets"

#: Where it stores the configs of published models.
LAYOUT_FOLDER = Path(str(resources.files("diffusion_align"))) / "layouts"

MANIFEST, PACKED = "assembly.json", ".packed"

#: In an assembled folder, written last: size and hash of every file.
RECORD = "assembled.json"


@dataclass(frozen=True)
class Part:
    """One file of an asset.

    Attributes:
        stored: where its bytes, or its packed weights, lie.
        packed: whether it has to be unpacked.
        parent: what its weights are a difference to.
    """

    stored: Path
    packed: bool = False
    parent: Part | None = None

    @cached_property
    def digest(self) -> bytes:
        """Of everything that the content depends on."""
        inner = b"" if self.parent is None else self.parent.digest
        return hashlib.sha256(bytes([self.packed]) + inner + self.stored.read_bytes()).digest()

    def weights(self) -> dict[str, Tensor]:
        """The tensors of a safetensors file."""
        from safetensors.torch import load

        from .packed import from_bytes, unpack

        content = self.stored.read_bytes()
        if not self.packed:
            return load(content)
        parent = None if self.parent is None else self.parent.weights()
        try:
            return unpack(from_bytes(content, str(self.stored)), parent)
        except ValueError as error:
            raise ValueError(f"{self.stored}: {error}") from error

    def content(self) -> bytes:
        """The whole file."""
        if not self.packed:
            return self.stored.read_bytes()
        from safetensors.torch import save

        return save(self.weights(), {"format": "pt"})


def asset_folder(name: str) -> Path:
    """Where the package stores ``name``; may lack what other assets have.

    Raises:
        ValueError: nothing of that name comes with the package.
    """
    if name not in SHIPPED:
        raise ValueError(
            f"{name!r} does not come with the package{hint(name, SHIPPED)}: expected one of {', '.join(SHIPPED)}"
        )
    return ASSETS / name


def layout_path(name: str) -> Path | None:
    """Folder with the configs of a published model, by its short name ("sdxl") or its hub name; None of others."""
    layout = PUBLISHED_LAYOUTS.get(name, name)
    return LAYOUT_FOLDER / layout if layout in (*LAYOUTS, *PUBLISHED_LAYOUTS.values()) else None


def shipped_path(name: str) -> Path:
    """Folder of a pipeline, scorer, evaluator, LoRA or data set that comes with the package, e.g. ``scenes-sdxl``.

    An ordinary folder: ``DiffusionPipeline.from_pretrained(shipped_path("scenes-uneven"))`` works. What the package
    stores in few bits is assembled at first use in ``$DIFFUSION_ALIGN_CACHE/shipped`` (default: ``diffusion-align`` in
    ``$XDG_CACHE_HOME`` or ``~/.cache``), again when a file is missing or torn, and by any number of processes at once.

    Raises:
        ValueError: nothing of that name comes with the package.
        OSError: the cache folder cannot be written.
    """
    stored = asset_folder(name)
    if not (stored / MANIFEST).is_file():
        return stored
    files = parts(name)
    digest = hashlib.sha256(b"".join(path.encode() + part.digest for path, part in files.items())).hexdigest()
    folder = cache_folder() / "shipped" / f"{name}-{digest[:16]}"
    if not is_complete(folder):
        assemble(files, folder)
    return folder


def parts(name: str) -> dict[str, Part]:
    """Files of an assembled ``name``, by path.

    Raises:
        ValueError: the manifest names a file that is not there.
    """
    stored = asset_folder(name)
    names = sorted(path.relative_to(stored).as_posix() for path in stored.rglob("*") if path.is_file())
    found = {path: Part(stored / path) for path in names if path != MANIFEST and not path.endswith(PACKED)}
    if MANIFEST not in names:
        return found
    manifest: Mapping[str, Mapping[str, str | None]] = json.loads((stored / MANIFEST).read_text())
    for path, parent in manifest["packed"].items():
        if f"{path}{PACKED}" not in names:
            raise ValueError(f"{stored / MANIFEST}: {path}{PACKED} is not there")
        found[path] = Part(stored / f"{path}{PACKED}", True, None if parent is None else part(parent))
    return found | {path: part(str(other)) for path, other in manifest["shared"].items()}


def part(reference: str) -> Part:
    """The file "ASSET/PATH".

    Raises:
        ValueError: there is none.
    """
    name, _, path = reference.partition("/")
    files = parts(name)
    if path not in files:
        raise ValueError(f"{asset_folder(name)}: has no {path}, which another asset shares or is a difference to")
    return files[path]


def cache_folder() -> Path:
    """Where this package may keep what can be made again."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "diffusion-align"


def is_complete(folder: Path) -> bool:
    """Whether every file that ``assemble`` wrote is there, as it was written."""
    try:
        facts = json.loads((folder / RECORD).read_bytes())
        stamps = {path: (folder / path).stat() for path in facts}
        if any(stamps[path].st_size != facts[path]["bytes"] for path in facts):
            return False
        now = tuple((path, stamp.st_ino, stamp.st_mtime_ns, facts[path]["sha256"]) for path, stamp in stamps.items())
        return _have_hashes(folder, now)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # no record, a torn one, or one of 0.1
        return False


@cache
def _have_hashes(folder: Path, files: tuple[tuple[str, int, int, str], ...]) -> bool:
    """Whether files have the hashes at the end; inode and time are those at which a process reads them once."""
    return all(sha256_of(folder / path) == expected for path, _, _, expected in files)


def assemble(files: Mapping[str, Part], folder: Path) -> None:
    """Write ``files`` to ``folder``, each whole or not at all, then the record of them.

    Processes that do the same at once replace a file by its equal, so nobody needs to wait.

    Raises:
        OSError: it cannot be written.
    """
    contents = {path: part.content() for path, part in files.items()}
    facts = {
        path: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for path, content in contents.items()
    }
    try:
        for path, content in contents.items():
            write_whole(folder / path, content)
        write_whole(folder / RECORD, json.dumps(facts, indent=2).encode() + b"\n")
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written ({error.strerror or error}): models that come with the package are unpacked "
            f"there once. Give another folder in the environment variable {CACHE_VARIABLE}"
        ) from error
