"""``diffusion-align annotate``: prompts in, preference pairs judged by scorers out (AI feedback)."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.data import load_prompts
from diffusion_align.devices import pick_device
from diffusion_align.files import append_rows, check_writable, naming, read_journal, sha256_of, write_parquet
from diffusion_align.pictures import decoded_picture
from diffusion_align.quiet import progress_bar
from diffusion_align.rewards import RewardScorer, load_scorer
from diffusion_align.rewards.relabelling import label
from diffusion_align.sampling.sampler import generate, to_uint8

from .console import conclude, note
from .opening import open_model, say_what_is_cut
from .options import AnnotateOptions


def annotate_files(options: AnnotateOptions) -> Path:
    """Draw ``per_prompt`` pictures for each prompt, score them, and write judged pairs; returns the parquet file.

    Each prompt's scores and pictures are kept in ``OUT/rows.jsonl`` and ``OUT/images`` as they are made; a run that
    died continues there.

    Raises:
        ValueError, FileNotFoundError: prompts, model, weights, scorers or options that cannot be used.
    """
    out = Path(options.out)
    check_writable(out / "images")
    scorers = load_annotators(options)
    prompts = load_prompts(options.prompts)
    device = pick_device(options.device)
    adapter = open_model(options, device)
    say_what_is_cut(adapter, prompts)
    finished = read_finished(out / "rows.jsonl", prompts, options)
    left = range(len(finished), len(prompts))
    for number in progress_bar(left, desc="prompts", initial=len(finished), total=len(prompts)):
        scores = judge_prompt(adapter, prompts[number], number, scorers, options, out / "images")
        finished.append(scores)
        pictures = [sha256_of(out / "images" / picture_name(number, i)) for i in range(options.per_prompt)]
        append_rows(out / "rows.jsonl", [{"prompt": prompts[number], "scores": scores, "sha256": pictures}])
    return write_pairs(out, prompts, finished, scorers, options)


def load_annotators(options: AnnotateOptions) -> dict[str, RewardScorer]:
    """Scorer by aspect, from ``ASPECT=SCORER`` options; a bare SCORER judges "overall".

    Raises:
        ValueError: two scorers for one aspect, a scorer that needs more than a picture and its prompt, or a number of
            pictures that gives no pair.
    """
    scorers: dict[str, RewardScorer] = {}
    for entry in options.scorers:
        aspect, _, name = entry.rpartition("=")
        aspect = aspect or "overall"
        if aspect in scorers:
            raise ValueError(f"--scorers: two scorers for {aspect!r}")
        given: dict[str, Any] = {}
        if name == "llm":
            given = {"url": options.llm_url, "model": options.llm_model, "cache": str(Path(options.out) / "llm.jsonl")}
        scorers[aspect] = load_scorer(name, **given)
        if scorers[aspect].needs:
            raise ValueError(
                f"scorer {name} needs {', '.join(sorted(scorers[aspect].needs))}: it cannot annotate prompts"
            )
    return scorers


#: Options that rows depend on. The prompts' file may have moved: rows hold their prompts.
DECISIVE = ("model", "lora", "scorers", "per_prompt", "seed")
#: The same; folders of 0.1 do not say them.
SAMPLER = ("num_inference_steps", "guidance_scale")
#: The same, which choose other weights; unset ones are left out, as in folders from before they were.
WEIGHTS = ("variant", "revision", "vae", "model_config", "family", "prediction_type")


def read_finished(path: Path, prompts: Sequence[str], options: AnnotateOptions) -> list[list[dict[str, float]]]:
    """Scores of the prompts already done; the first line holds the options, and a torn last line is cut off.

    Raises:
        ValueError: the folder belongs to a run with other options or prompts, the line that says them is damaged, or a
            picture has changed since it was scored; what differs is named.
    """
    chosen = [name for name in WEIGHTS if getattr(options, name) is not None]
    now = {name: getattr(options, name) for name in ("prompts", *DECISIVE, *SAMPLER, *chosen)}
    now = json.loads(json.dumps(now))
    whole = read_journal(path)
    if not whole:
        append_rows(path, [now])
        return []
    before = _with_list(whole[0])
    before = {name: now[name] for name in SAMPLER} | before
    otherwise = "delete it, or give another --out"
    for name in (*DECISIVE, *SAMPLER, *WEIGHTS):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{path} belongs to a run with other options ({name} was {before.get(name)!r}, is {now.get(name)!r}): "
                f"{otherwise}"
            )
    rows = whole[1:]
    for number, row in enumerate(rows):
        given = prompts[number] if number < len(prompts) else None
        if row["prompt"] != given:
            found = "there is none now" if given is None else f"is {given!r} now"
            raise ValueError(
                f"{path} belongs to a run with other prompts (prompt {number + 1} was {row['prompt']!r}, {found}): "
                f"{otherwise}"
            )
    for number, row in enumerate(rows):
        check_pictures(path.parent / "images", number, row)
    return [row["scores"] for row in rows]


def check_pictures(folder: Path, number: int, row: Mapping[str, Any]) -> None:
    """Whether the pictures of a prompt are those that were scored; rows of before 0.2 do not say.

    Raises:
        ValueError: one is missing or was changed; it is named.
    """
    for i, expected in enumerate(row.get("sha256", ())):
        path = folder / picture_name(number, i)
        if not path.is_file() or sha256_of(path) != expected:
            raise ValueError(
                f"{path} is missing or does not match its checksum: restore it, or delete line {number + 2} of "
                f"{folder.parent / 'rows.jsonl'} and those after it, to draw it again"
            )


def _with_list(header: dict[str, Any]) -> dict[str, Any]:
    """A header whose ``lora`` is a list: up to 0.1 it was one name or null."""
    lora = header.get("lora")
    return header | {"lora": [lora] if isinstance(lora, str) else lora or []}


def judge_prompt(
    adapter: Adapter,
    prompt: str,
    number: int,
    scorers: Mapping[str, RewardScorer],
    options: AnnotateOptions,
    folder: Path,
) -> list[dict[str, float]]:
    """Draw and save one prompt's pictures; each picture's score per aspect."""
    count = options.per_prompt
    images = generate(
        adapter,
        [prompt] * count,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        seeds=[options.seed + number * count + i for i in range(count)],
        batch_size=options.batch_size,
    )
    files = [encoded(picture) for picture in to_uint8(images)]
    for i, content in enumerate(files):
        with naming(folder / picture_name(number, i)):
            (folder / picture_name(number, i)).write_bytes(content)
    pictures = [decoded_picture(content, prompt) for content in files]  # as whoever reads them sees them
    scores: list[dict[str, float]] = [{} for _ in range(count)]
    for aspect, scorer in scorers.items():
        with torch.no_grad():
            output = scorer.score(pictures, [prompt] * count)
        sign = 1.0 if scorer.higher_is_better else -1.0
        columns: dict[str, Tensor] = {aspect: sign * output.reward}
        if aspect == "overall":  # a scorer of the whole may also judge its parts
            columns = {name: values for name, values in output.aspects.items() if name not in scorers} | columns
        for name, values in columns.items():
            for row, value in zip(scores, values.tolist(), strict=True):
                row[name] = value
    return scores


def picture_name(prompt: int, picture: int) -> str:
    return f"{prompt:06d}-{picture}.jpg"


def encoded(picture: Any) -> bytes:
    """JPEG without chroma subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def write_pairs(
    out: Path,
    prompts: Sequence[str],
    scores: Sequence[Sequence[dict[str, float]]],
    scorers: Mapping[str, RewardScorer],
    options: AnnotateOptions,
) -> Path:
    """The pairs of all prompts as ``OUT/train-00000-of-00001.parquet``."""
    from datasets import Dataset

    standardised = standardise(scores, "overall" in scorers)
    rows = [
        pair_row(out / "images", prompts[p], p, a, b, standardised, options.tie_margin)
        for p in range(len(prompts))
        for a, b in chosen_pairs([picture["overall"] for picture in standardised[p]], options.pairs)
    ]
    path = out / "train-00000-of-00001.parquet"
    write_parquet(path, Dataset.from_list(rows))
    decisive = sum(row["label_0"] != 0.5 for row in rows)
    note(f"{len(rows)} pairs of {len(prompts)} prompts, {len(rows) - decisive} ties")
    return path


def standardise(scores: Sequence[Sequence[dict[str, float]]], has_overall: bool) -> list[list[dict[str, float]]]:
    """Every aspect in units of its deviation within prompts; "overall" is their mean if no scorer judged it."""
    names = list(scores[0][0])
    table = torch.tensor(
        [[[picture[name] for name in names] for picture in row] for row in scores], dtype=torch.float64
    )
    centred = table - table.mean(dim=1, keepdim=True)
    spread = centred.square().mean(dim=(0, 1)).sqrt().clamp(min=1e-12)
    units = centred / spread
    if not has_overall:
        units, names = torch.cat([units, units.mean(dim=2, keepdim=True)], dim=2), [*names, "overall"]
    return [[dict(zip(names, picture.tolist(), strict=True)) for picture in row] for row in units]


def chosen_pairs(overall: Sequence[float], how: str) -> Iterator[tuple[int, int]]:
    """Indices of the pictures to compare: every pair, or the best with the worst."""
    if how == "all":
        yield from combinations(range(len(overall)), 2)
        return
    order = sorted(range(len(overall)), key=lambda i: overall[i])
    yield order[-1], order[0]


def pair_row(
    folder: Path, prompt: str, number: int, a: int, b: int, scores: Sequence[Sequence[dict[str, float]]], margin: float
) -> dict[str, Any]:
    """One row in Pick-a-Pic's columns, with a label and both scores per aspect; the order of the two is by content."""
    files = {i: (folder / picture_name(number, i)).read_bytes() for i in (a, b)}
    uids = {i: hashlib.sha256(content).hexdigest()[:32] for i, content in files.items()}
    first, second = sorted((a, b), key=lambda i: uids[i])
    labels = {
        name: label(scores[number][first][name] - scores[number][second][name], margin)
        for name in scores[number][first]
    }
    overall = labels.pop("overall")
    best = "none" if overall == 0.5 else uids[first if overall == 1 else second]
    row = {
        "are_different": files[a] != files[b], "best_image_uid": best, "caption": prompt, "has_label": True,
        "image_0_uid": uids[first], "image_1_uid": uids[second], "jpg_0": files[first], "jpg_1": files[second],
        "label_0": overall, "label_1": 1 - overall, "num_example_per_prompt": 1, "ranking_id": str(number),
    }  # fmt: skip
    row |= {f"label_0_{name}": value for name, value in labels.items()}
    for i, picture in enumerate((first, second)):
        row |= {f"score_{i}_{name}": value for name, value in scores[number][picture].items()}
    return row


def run(options: AnnotateOptions) -> int:
    """Make the pairs and print their file; returns the exit status."""
    pairs = annotate_files(options)
    conclude(pairs, {"pairs": str(pairs)})
    return 0
