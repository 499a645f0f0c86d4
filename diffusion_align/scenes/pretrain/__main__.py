import sys
from pathlib import Path
from .corpus import make_corpus, load_corpus
from .vae import train_vae
if __name__ == "__main__":
    work = Path("runs/pretrain")
    stage = sys.argv[1]
    if stage == "data":
        make_corpus(work / "corpus", 48000, 1)
    if stage == "vae":
        train_vae(load_corpus(work / "corpus"), work / "vae", float(sys.argv[2]))
