"""``diffusion-align push``: an allow-list of a run's files, cleaned, to a repository of the hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from diffusion_align.commands.console import conclude

from .card import NAME, write_card
from .cleaning import check_secrets, cleaned, cleaned_values
from .gallery import FOLDER
from .run_facts import RunFacts
from .sharing_options import PushOptions

if TYPE_CHECKING:
    from huggingface_hub import HfApi

#: Settings, and the table of an evaluation, as the hub gets them.
CONFIG, TABLE = "config.yaml", "evaluation.json"
#: Files whose text is looked through for secrets.
TEXTS = (".md", ".yaml", ".json", ".txt")


class PushError(RuntimeError):
    """The card is written, but nothing was sent."""


def stage(facts: RunFacts, place: Path) -> list[Path]:
    """Copy what may be sent to ``place``: weights, card, gallery, settings, table; returns the files.

    Raises:
        ValueError: a text looks as if it held a secret; the file is named.
        OSError: a file cannot be read or written.
    """
    for name in [NAME, *facts.weights, *pictures(facts)]:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(facts.folder / name, place / name)
    settings = yaml.safe_load((config_file(facts)).read_text())
    (place / CONFIG).write_text(yaml.safe_dump(cleaned_values(settings), sort_keys=False))
    if facts.evaluation is not None:
        (place / TABLE).write_text(json.dumps(cleaned_values(facts.evaluation), indent=2) + "\n")
    (place / NAME).write_text(cleaned_card((place / NAME).read_text()))
    files = sorted(path for path in place.rglob("*") if path.is_file())
    for path in files:
        if path.suffix in TEXTS:
            check_secrets(path.read_text(errors="replace"), str(path.relative_to(place)))
    return files


def config_file(facts: RunFacts) -> Path:
    """Settings of the run, also for a checkpoint in its folder."""
    own = facts.folder / CONFIG
    return own if own.is_file() else facts.folder.parent / CONFIG


def pictures(facts: RunFacts) -> list[str]:
    """The gallery that the card names."""
    text = (facts.folder / NAME).read_text()
    found = sorted((facts.folder / FOLDER).glob("*.png"))
    return [f"{FOLDER}/{file.name}" for file in found if f"{FOLDER}/{file.name}" in text]


def cleaned_card(text: str) -> str:
    """A card's text, also a person's part, without paths of this machine; addresses stay."""
    return "\n".join(line if "://" in line or "<Gallery" in line else cleaned(line) for line in text.split("\n"))


def push(options: PushOptions, api: HfApi | None = None) -> tuple[str, dict[str, int]]:
    """Write the card and send the files; returns the repository's address and the files with their bytes.

    Args:
        api: of the hub; None makes one, with the token of this machine.

    Raises:
        PushError: the hub cannot be reached, or refuses; the card stays.
        ValueError, FileNotFoundError: as ``write_card`` and ``stage``; a repository that is public already.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    card, _, facts = write_card(options.card())
    with tempfile.TemporaryDirectory() as place:
        files = stage(facts, Path(place))
        sizes = {str(file.relative_to(place)): file.stat().st_size for file in files}
        if options.dry_run:
            return f"https://huggingface.co/{options.repo}", sizes
        hub = api or HfApi()
        # HfHubHTTPError's first base is what the installed client's own library raises where there is no network.
        refusals: tuple[Any, ...] = (OSError, *HfHubHTTPError.__bases__, LocalTokenNotFoundError, OfflineModeIsEnabled)
        try:
            address = hub.create_repo(options.repo, private=not options.public, exist_ok=True)
            if not options.public and not hub.model_info(options.repo).private:
                raise ValueError(f"{options.repo} is public: give --public, or another repository")
            hub.create_commit(
                options.repo,
                [CommitOperationAdd(str(file.relative_to(place)), str(file)) for file in files],
                commit_message=f"{facts.method} run, by diffusion-align",
            )
        except refusals as error:
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise PushError(f"card written to {card}, not pushed: {why}") from error
    return str(address), sizes


def run_push(options: PushOptions) -> int:
    """Push, and print where to and what; returns the exit status."""
    address, sizes = push(options)
    width = max(map(len, sizes))
    lines = [f"{name.ljust(width)}  {size:>12,} bytes" for name, size in sizes.items()]
    total = f"{len(sizes)} files, {sum(sizes.values()):,} bytes"
    lines.append(f"{total}; nothing was sent (dry run)" if options.dry_run else f"{total}: {address}")
    said = {"repository": address, "sent": not options.dry_run, "private": not options.public, "files": sizes}
    conclude("\n".join(lines), said)
    return 0
