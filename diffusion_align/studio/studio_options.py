"""Options of ``diffusion-align studio``. Nothing heavy is imported here: --help must be instant."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from diffusion_align.commands.options import Options
from diffusion_align.commands.parsing import parse_options

#: Where it may listen.
LOOPBACK_ADDRESSES = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class StudioOptions(Options):
    """Label, compare, watch and browse in a browser on this machine. All that is written goes into FOLDER."""

    counts: ClassVar[tuple[str, ...]] = ()

    folder: str = "."
    """Folder with runs, pictures and data sets, in which everything is written (the flag may be left out if it comes
    first)."""
    port: int = 0
    """Port to listen at; 0 takes a free one."""
    annotator: str | None = None
    """Who labels; unset is the user's name. The page can change it."""
    no_browser: bool = False
    """Only print the address."""
    data: tuple[str, ...] = ()
    """Further folders or files that may be shown, beside FOLDER."""
    source: tuple[str, ...] = ()
    """What to label: parquet files or a folder of them in Pick-a-Pic's columns (of annotate), or two folders of
    pictures or more. Begins the folder of labels; unset goes on with it, or lets the page begin one."""
    labels: str = "labels"
    """Name of the folder of labels in FOLDER."""
    kind: Literal["pairs", "best-worst", "swiss"] = "pairs"
    """Two pictures at a time; all of a prompt, of which the best and the worst are told; or a Swiss tournament."""
    match: Literal["auto", "record", "name", "order"] = "auto"
    """How pictures of folders belong together: prompt and seed of their records, file names, or their order."""
    order: Literal["random", "file", "active"] = "random"
    """active: mostly what two scorers or more disagree about or find close (columns score_0_NAME, score_1_NAME)."""
    holdout: float = 0.0
    """Share of the prompts that are exported as a test split; needs 50 prompts."""
    aspects: tuple[str, ...] = ()
    """Also ask which picture is better in these, e.g. composition light."""
    words: bool = False
    """Also let words be marked that a picture does not show."""
    seed: int | None = None
    """Of sides and order; unset draws one."""
    host: str = "127.0.0.1"
    """Address to listen at; only this machine's own."""
    allow_host: tuple[str, ...] = ()
    """Further names that the browser may reach it by, e.g. of a jupyter-server-proxy."""
    root_path: str = ""
    """What a proxy puts before every path, e.g. /user/ada/proxy/8000."""
    idle: float = 10.0
    """Minutes without a job after which the model is unloaded."""

    def check(self) -> None:
        super().check()
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port {self.port}: expected 0 to 65535")
        if self.host not in LOOPBACK_ADDRESSES:
            raise ValueError(
                f"--host {self.host}: the studio listens to this machine alone. From another one: "
                f"ssh -L 8000:127.0.0.1:PORT USER@THIS-MACHINE, with --port PORT here"
            )
        if not 0 <= self.holdout < 1:
            raise ValueError(f"--holdout {self.holdout:g}: expected a share, 0 to 1")
        if not self.idle > 0:
            raise ValueError(f"--idle {self.idle:g}: expected more than 0 minutes")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ValueError(f"--root-path {self.root_path}: expected /PATH without a slash at its end")


#: From arguments to checked options.
parse = partial(parse_options, StudioOptions, "studio", bare="--folder")
