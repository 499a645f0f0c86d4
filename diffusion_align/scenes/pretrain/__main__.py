"""Command line of the pretraining: one stage after the other, each reads what the earlier ones left in ``--work``."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusion_align.rewards import load_scorer
from diffusion_align.shipped import shipped_path

from .corpus import SEED, load_corpus, make_corpus
from .flow import train_flow
from .pipelines import train_inpaint, train_sd, train_sdxl
from .reader import new_reader, rendered_pictures, seen_pictures, train_reader
from .uneven import train_uneven
from .vae import train_vae

STAGES = ("data", "vae", "sdxl", "sd", "inpaint", "uneven", "flow", "reader")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diffusion_align.scenes.pretrain", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="working folder")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/pretrain/pipelines"),
        help="finished pipelines, for diffusion_align.scenes.pack",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="training budget")
    parser.add_argument("--images", type=int, default=48_000, help="size of the corpus (stage data)")
    parser.add_argument("--name", default="reader", help="folder of the trained reader in --work")
    parser.add_argument("--scorer", help="continue from this vp-score's tower (reader)")
    parser.add_argument(
        "--pictures", type=Path, nargs="+", default=(), help="look at judged folders' pictures (reader)"
    )
    args = parser.parse_args()
    if args.stage == "data":
        make_corpus(args.work / "corpus", args.images, SEED)
        return
    corpus = load_corpus(args.work / "corpus")

    def base(name: str) -> Path:
        """The pipeline to continue from: the one trained here, or the shipped one."""
        return args.out / name if (args.out / name).is_dir() else shipped_path(name)

    if args.stage == "vae":
        train_vae(corpus, args.work / "vae", args.minutes)
    elif args.stage == "sdxl":
        train_sdxl(corpus, args.work, args.out / "scenes-sdxl", args.minutes)
    elif args.stage == "sd":
        train_sd(corpus, args.work, args.out / "scenes-sd", base("scenes-sdxl"), args.minutes)
    elif args.stage == "uneven":
        train_uneven(corpus, args.work, args.out / "scenes-uneven", base("scenes-sdxl"), args.minutes)
    elif args.stage == "flow":
        train_flow(corpus, args.work, args.out / "scenes-flow", base("scenes-sdxl"), args.minutes)
    elif args.stage == "reader":
        tokenizer = base("scenes-sdxl") / "tokenizer"
        reader = load_scorer(args.scorer) if args.scorer else new_reader(tokenizer)
        seen = seen_pictures(args.pictures) if args.pictures else None
        train_reader(reader, rendered_pictures(corpus), args.work / args.name, args.minutes, seen)
    else:
        train_inpaint(corpus, args.work, args.out / "scenes-inpaint", base("scenes-sd"), args.minutes)


if __name__ == "__main__":
    main()
