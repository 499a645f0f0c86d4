"""What may not leave this machine: paths of its disk, names of its users, and secrets."""

from __future__ import annotations

import getpass
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Strings that look like keys of services, by whose they are.
SECRETS: Mapping[str, re.Pattern[str]] = {
    "Hugging Face": re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"),
    "OpenAI or Anthropic": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "GitHub": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})"),
    "AWS": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "Google": re.compile(r"\bAIza[0-9A-Za-z_-]{35}\b"),
    "Slack": re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a web address with a password": re.compile(r"\b[a-z]+://[^\s/:@]+:[^\s/@]+@"),
}
#: A path from the root or the home folder, or of a Windows drive, in running text.
_PATH = re.compile(r"(?<![\w./:-])(?:~|[A-Za-z]:\\|/)[\w.+ -]*(?:[/\\][\w.+-]+)+")


def check_secrets(text: str, where: str) -> None:
    """Refuse what looks like a key; the key itself is not repeated.

    Raises:
        ValueError: it has one; file, line and whose it is are named.
    """
    for number, line in enumerate(text.splitlines(), start=1):
        for whose, pattern in SECRETS.items():
            if pattern.search(line):
                raise ValueError(
                    f"{where}, line {number}: this looks like a secret ({whose}): take it out before it is shared"
                )


def cleaned(text: str) -> str:
    """Text with paths of this machine cut to their last part, and this user's name left out of what stays."""
    short = _PATH.sub(lambda found: Path(found[0].replace("\\", "/")).name, text)
    user = _user()
    return re.sub(rf"\b{re.escape(user)}\b", "USER", short) if user and len(user) > 2 and user != "root" else short


def cleaned_values(value: Any) -> Any:
    """JSON or YAML values with every text cleaned."""
    if isinstance(value, str):
        return cleaned(value)
    if isinstance(value, Mapping):
        return {cleaned(str(key)): cleaned_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned_values(each) for each in value]
    return value


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
