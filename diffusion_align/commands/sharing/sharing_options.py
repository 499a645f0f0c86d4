"""Options of ``diffusion-align card`` and ``push``. Nothing heavy is imported here: --help must be instant."""

from __future__ import annotations

import re
from dataclasses import dataclass

from diffusion_align.commands.options import Options

#: USER/NAME, as the hub takes it.
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class CardOptions(Options):
    """Write README.md, a model card, into a run's folder: how to load it, what it was trained on and how, what was
    measured, and what was not checked. What a person wrote outside of its marks stays."""

    run: str
    """Folder of a finished run (the flag may be left out if it comes first)."""
    evaluation: str | None = None
    """Folder that evaluate wrote with this run as a side: its table and pictures go into the card. Unset: RUN/evaluate
    if there is one, else the run's own last validation."""
    license: str | None = None
    """Licence of the weights, as the hub names it (openrail++, apache-2.0); unset: that of a known base model, and none
    for others: it is never guessed."""
    num_pictures: int = 4
    """Pictures in the gallery, from the evaluation, or drawn with the run's validation prompts; 0: none."""
    hub_model_id: str = "USER/REPO"
    """Repository that the card's code loads from."""
    device: str = "auto"
    """Where pictures are drawn: cuda, mps, cpu; auto takes a GPU where there is one."""

    def check(self) -> None:
        super().check()
        if self.num_pictures < 0:
            raise ValueError(f"--num-pictures {self.num_pictures}: expected at least 0")
        if not REPOSITORY.fullmatch(self.hub_model_id):
            raise ValueError(f"--hub-model-id {self.hub_model_id}: expected USER/NAME")


@dataclass(frozen=True, kw_only=True)
class PushOptions(Options):
    """Send a run to the hub: weights, card, gallery, settings and table, and nothing else. Private unless --public.

    The token is the one of 'hf auth login', or HF_TOKEN.
    """

    run: str
    """Folder of a finished run (the flag may be left out if it comes first)."""
    repo: str
    """USER/NAME (the flag may be left out if it comes second)."""
    public: bool = False
    """Everybody may see it; unset: only you."""
    dry_run: bool = False
    """List the files and their sizes, and send nothing."""
    evaluation: str | None = None
    """As of card."""
    license: str | None = None
    """As of card."""
    num_pictures: int = 4
    """As of card."""
    device: str = "auto"
    """As of card."""

    def check(self) -> None:
        super().check()
        if not REPOSITORY.fullmatch(self.repo):
            raise ValueError(f"--repo {self.repo}: expected USER/NAME")
        self.card().check()

    def card(self) -> CardOptions:
        """Options of the card that is sent."""
        return CardOptions(
            run=self.run,
            evaluation=self.evaluation,
            license=self.license,
            num_pictures=self.num_pictures,
            hub_model_id=self.repo,
            device=self.device,
        )
