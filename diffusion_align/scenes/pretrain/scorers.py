"""Put a trained scorer among the shipped ones, in half precision: ``python -m ...pretrain.scorers FOLDER NAME``."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from diffusion_align.adapters import shipped_path


def ship(folder: Path, name: str) -> Path:
    """Copy what ``train reward`` saved to the shipped scorer ``name``; floats become fp16, the card stays."""
    target = shipped_path(name)
    target.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            weights = {
                key: value.half() if value.is_floating_point() else value for key, value in load_file(file).items()
            }
            save_file(weights, target / file.name)
        else:
            shutil.copy(file, target / file.name)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diffusion_align.scenes.pretrain.scorers", description=__doc__)
    parser.add_argument("folder", type=Path, help="the scorer folder of a finished run")
    parser.add_argument("name", help="e.g. scenes-vp")
    args = parser.parse_args()
    print(ship(args.folder, args.name))


if __name__ == "__main__":
    main()
