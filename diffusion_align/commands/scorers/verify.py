"""``diffusion-align scorers verify``: does a scorer load here, and does it say what it should?"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.request import urlopen

import torch
from torch import Tensor

from diffusion_align.commands.console import conclude
from diffusion_align.commands.options import VerifyScorerOptions
from diffusion_align.commands.parsing import scorer_options
from diffusion_align.devices import pick_device
from diffusion_align.environment import versions
from diffusion_align.files import sha256_of
from diffusion_align.pictures import opened_picture, rgb_picture
from diffusion_align.rewards import RewardScorer, load_scorer
from diffusion_align.rewards.catalogue import FACTS, MODEL_FILES, Part, find_files
from diffusion_align.shipped import SHIPPED_SCORERS, shipped_path

from .cards import LARGE_SIZE, SCENE_SIZE, Cards, mismatched, scene_cards, sign_cards
from .references import REFERENCES, Reference

COLUMNS = ("scorer", "weights", "with", "scores of the cards", "the same with another card's prompts", "compared")
#: What decides a score, of what is installed.
SOFTWARE = ("diffusion-align", "torch", "transformers")
#: Seconds to wait for one of the authors' pictures.
PATIENCE = 30
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Finding:
    """What a scorer did here.

    Attributes:
        weights: what was loaded, by file name, with the start of its SHA-256.
        software: versions and device.
        scores: of the four cards.
        mismatched: of the cards with each other's prompts.
        alone: largest difference of a card's score alone and in the batch of four.
        repeated: largest difference of two scorings of the batch.
        compared: what the scores were compared with, and how far they are off; or why they were not.
        passed: False where they are off by more than the reference allows.
    """

    scorer: str
    weights: list[str]
    software: list[str]
    scores: list[float]
    mismatched: list[float]
    alone: float
    repeated: float
    compared: str
    passed: bool

    def row(self) -> str:
        """A row of the table in docs/evidence/scorers.md."""
        cells = (
            f"`{self.scorer}`",
            ", ".join(self.weights) or "none",
            ", ".join(self.software),
            " ".join(f"{score:.4g}" for score in self.scores),
            " ".join(f"{score:.4g}" for score in self.mismatched),
            self.compared,
        )
        return f"| {' | '.join(cells)} |"


def verify(options: VerifyScorerOptions) -> Finding:
    """Load the scorer and try it.

    Raises:
        FileNotFoundError: the weights are neither here nor can they be fetched; the message says where they are.
        ValueError: no such scorer, or options or weights that do not fit it; or it cannot judge the cards.
        RuntimeError: scores that are not finite.
    """
    device = pick_device(options.device)
    given = scorer_options(options.options)
    scorer = load_scorer(options.scorer, options.checkpoint, device=device, **given)
    cards = deal(options.scorer, scorer)
    scores, again = score(scorer, cards), score(scorer, cards)
    alone = torch.cat([score(scorer, one) for one in singles(cards)])
    compared, passed = compare(scorer, scores, None if options.checkpoint or given else REFERENCES.get(options.scorer))
    return Finding(
        options.scorer,
        weights_of(options),
        [*(f"{name} {version}" for name, version in versions().items() if name in SOFTWARE), str(device)],
        scores.tolist(),
        score(scorer, mismatched(cards)).tolist(),
        float((scores - alone).abs().max()),
        float((scores - again).abs().max()),
        compared,
        passed,
    )


def deal(name: str, scorer: RewardScorer) -> Cards:
    """The cards for a scorer, with the context that it needs.

    Raises:
        ValueError: it needs something that no card has.
    """
    facts = FACTS.get(name)
    small = facts is None or facts.package == "diffusion_align"
    cards = sign_cards() if name == "ocr" else scene_cards(SCENE_SIZE if small else LARGE_SIZE)
    known = getattr(scorer, "users", None)
    users = {"users": list(known[: len(cards.prompts)])} if known else {}
    context = cards.context | users
    missing = sorted(scorer.needs - context.keys())
    if missing:
        raise ValueError(f"scorer {name} needs {', '.join(missing)}, which the cards do not have")
    return Cards(cards.images, cards.prompts, {key: context[key] for key in sorted(scorer.needs)})


def singles(cards: Cards) -> list[Cards]:
    """Each card for itself."""
    return [
        Cards(cards.images[i : i + 1], cards.prompts[i : i + 1], {k: v[i : i + 1] for k, v in cards.context.items()})
        for i in range(len(cards.prompts))
    ]


def score(scorer: RewardScorer, cards: Cards) -> Tensor:
    """Rewards (B,) on the CPU.

    Raises:
        RuntimeError: one of them is not finite.
    """
    with torch.no_grad():
        rewards = scorer.score(cards.images, cards.prompts, **cards.context).reward.float().cpu()
    if not bool(rewards.isfinite().all()):
        raise RuntimeError(f"scorer {scorer.name} gave {rewards.tolist()} for {cards.prompts}: expected finite numbers")
    return rewards


def compare(scorer: RewardScorer, scores: Tensor, reference: Reference | None) -> tuple[str, bool]:
    """In words, and whether the scores are as near to ``reference`` as it asks."""
    if reference is None:
        return "no reference numbers", True
    if reference.pictures:
        try:
            pictures = [rgb_picture(opened_picture(fetch(address), address), address) for address in reference.pictures]
        except OSError as error:  # urllib's errors are OSErrors
            return f"not compared: the pictures of {reference.source} cannot be fetched ({type(error).__name__})", True
        with torch.no_grad():
            scores = scorer.score(pictures, reference.prompts).reward.float().cpu()
    off = float((scores - torch.tensor(reference.scores)).abs().max())
    passed = off <= reference.tolerance
    verdict = "as" if passed else "NOT as"
    return f"{verdict} {reference.source}: off by {off:.2g} at most (allowed {reference.tolerance:g})", passed


def fetch(address: str) -> bytes:
    """A file of the web.

    Raises:
        OSError: it cannot be fetched, or HF_HUB_OFFLINE says not to try.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        raise OSError("HF_HUB_OFFLINE is set")
    with urlopen(address, timeout=PATIENCE) as answer:
        content: bytes = answer.read()
    return content


def weights_of(options: VerifyScorerOptions) -> list[str]:
    """What was loaded: files with the start of their SHA-256, or the package that holds them."""
    facts = FACTS.get(options.scorer)
    if facts is not None and facts.package not in (None, "diffusion_align"):
        return [f"package {facts.package}"]
    return [f"{path.name} {digest(path)[:12]}" for path in weight_files(options)]


def weight_files(options: VerifyScorerOptions) -> list[Path]:
    """Files of the weights that ``options`` name; none where this machine has none (an address, a plug-in)."""
    path = Path(options.checkpoint or options.scorer)
    if options.checkpoint is None and options.scorer in SHIPPED_SCORERS:
        path = shipped_path(options.scorer)
    elif options.checkpoint is None and options.scorer in FACTS:
        found = [file for part in FACTS[options.scorer].parts for file in find_files(part)]
        return [file for file in found if file.suffix in WEIGHTS]
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix in WEIGHTS)
    if path.is_file():
        return [path]
    return find_files(Part(options.checkpoint, MODEL_FILES)) if options.checkpoint else []


def digest(path: Path) -> str:
    """SHA-256 of a file. The hub's cache names large files by it, so that they need not be read again."""
    name = path.resolve().name
    return name if re.fullmatch("[0-9a-f]{64}", name) else sha256_of(path)


def run(options: VerifyScorerOptions) -> int:
    """Verify and print; returns the exit status, 1 where the scores are not those of the reference."""
    finding = verify(options)
    lines = [
        f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n{finding.row()}\n",
        f"largest difference of a card alone and among four: {finding.alone:.2g}",
        f"largest difference of two scorings of the same cards: {finding.repeated:.2g}",
    ]
    if not finding.passed:
        lines.append("The scores are not those of the reference: something differs from what was published.")
    elif not FACTS.get(options.scorer) or FACTS[options.scorer].package is None:
        lines.append(
            "If these weights were not in docs/evidence/scorers.md before: an issue with the row above is welcome."
        )
    conclude("\n".join(lines), asdict(finding))
    return 0 if finding.passed else 1
