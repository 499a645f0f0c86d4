"""``diffusion-align cache verify`` and ``cache gc``."""

from __future__ import annotations

from pathlib import Path

from diffusion_align.commands.console import conclude
from diffusion_align.data import CachedPairs, load_in_file_order
from diffusion_align.data.cache import collect_garbage, compare, damage, garbage, read_manifest

from .folder_options import CollectCacheOptions, VerifyCacheOptions


def verify(options: VerifyCacheOptions) -> int:
    """Check a cache and say what is wrong; returns the exit status."""
    record = read_manifest(_folder(options.folder))
    problems = list(damage(options.folder))
    if options.data and not problems:
        problems = _compared(options)
    if problems:
        lines = [f"WRONG {problem}" for problem in problems]
        again = "run 'diffusion-align cache' again with its settings: only what is wrong is made again"
        conclude("\n".join([*lines, f"{options.folder}: {again}"]), {"ok": False, "problems": problems})
        return 1
    size = sum(facts["bytes"] for facts in record["shards"].values())
    checked = "checksums and contents" + (", rows and pictures of its data set" if options.data else "")
    held = f"{len(record['pairs']):,} {record.get('unit', 'pairs')}, {len(record['shards'])} shards"
    ok = f"ok: {options.folder}: {held}, {size / 2**20:,.1f} MiB; {checked} are right"
    conclude(ok, {"ok": True, "problems": [], "bytes": size})
    return 0


def collect(options: CollectCacheOptions) -> int:
    """Remove what a cache does not need and say how much; returns the exit status."""
    folder = _folder(options.folder)
    found = garbage(folder) if options.dry_run else collect_garbage(folder)
    done = "would be removed" if options.dry_run else "removed"
    told = f"{options.folder}: {len(found)} files, {sum(found.values()):,} bytes {done}"
    files = {str(path): size for path, size in found.items()}
    conclude("\n".join([*files, told]), {"removed": not options.dry_run, "files": files})
    return 0


def _folder(folder: str) -> Path:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder; expected one that 'diffusion-align cache' made")
    return Path(folder)


def _compared(options: VerifyCacheOptions) -> list[str]:
    """How the data set differs."""
    record = read_manifest(Path(options.folder))
    settings = (record.get("data") or {}).get("settings")
    if settings is None:
        raise ValueError(
            f"{options.folder} does not say what it was made of (an earlier version made it, or the Python function): "
            "'diffusion-align cache' with its settings compares it with its data set and adds that"
        )
    if options.dataset is not None:
        settings = settings | {"source": options.dataset}
    cached = CachedPairs(options.folder, pictures=settings["pictures"])
    return list(compare(cached, load_in_file_order(**settings), thorough=True).differences)
