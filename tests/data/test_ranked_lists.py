"""Ranked lists: what is read, what is refused, how lists of different lengths share a batch, and the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.data import (
    CachedPairs,
    CacheError,
    PairBatch,
    PairDataset,
    PairLoader,
    PairTransform,
    PixelExamples,
    StreamLoader,
    build_cache,
    load_examples,
    require_same_data,
)
from diffusion_align.data.beyond_pairs.ranked import ListSize, sized_lists
from diffusion_align.data.types import ListRecord

from .test_data import encoded, value

TRANSFORM = PairTransform(16, random_flip=False)
#: Values of the pictures of each list; the brightest is the best.
SHADES = ([30, 10, 20], [5, 50], [7, 7, 90, 60], [1, 2, 3])


@pytest.fixture(scope="module")
def adapter(sd_folder: Path) -> Adapter:
    return load_adapter(str(sd_folder))


def table(**columns: Any) -> dict[str, Any]:
    return {
        "images": [[encoded(shade, (32, 32)) for shade in shades] for shades in SHADES],
        "caption": [f"caption {i}" for i in range(len(SHADES))],
        "scores": [[float(shade) for shade in shades] for shades in SHADES],
    } | columns


def parquet(path: Path, table: dict[str, Any]) -> Path:
    pq.write_table(pa.table(table), path, row_group_size=2)
    return path


def read(source: Path, **options: Any) -> list[tuple[list[int], ListRecord]]:
    """Values of the pictures of each list, and the list."""
    lists = load_examples(source, units=("ranked lists",), **options)
    records = [record for _, record in lists.records(lists.numbers())]
    assert all(isinstance(record, ListRecord) for record in records)
    return [([value(each) for each in record.pictures], record) for record in records]  # type: ignore[union-attr]


@pytest.mark.parametrize("streaming", [False, True])
def test_scores_say_the_order(tmp_path: Path, streaming: bool) -> None:
    found = read(parquet(tmp_path / "a.parquet", table()), streaming=streaming)
    assert [shades for shades, _ in found] == [list(shades) for shades in SHADES]
    ranks = [record.judgement.ranks for _, record in found]
    assert ranks == [(0, 2, 1), (1, 0), (2, 2, 0, 1), (2, 1, 0)]
    assert found[1][1].judgement.scores == (5.0, 50.0)


def test_ranks_are_made_dense_and_come_before_scores(tmp_path: Path) -> None:
    ranks = [[1, 3, 3], [2, 1], [1, 2, 3, 4], [1.5, 1.5, 9]]
    found = read(parquet(tmp_path / "a.parquet", table(ranks=ranks)))
    assert [record.judgement.ranks for _, record in found] == [(0, 1, 1), (1, 0), (0, 1, 2, 3), (0, 0, 1)]
    assert found[0][1].judgement.scores == (30.0, 10.0, 20.0)


def test_pictures_may_have_a_column_each(tmp_path: Path) -> None:
    shades = [[*each, None, None][:4] for each in SHADES]
    columns = {
        f"jpg_{i}": [None if each[i] is None else encoded(each[i]) for each in shades]  # type: ignore[arg-type]
        for i in range(4)
    }
    whole = table()
    file = parquet(tmp_path / "a.parquet", columns | {name: whole[name] for name in ("caption", "scores")})
    assert [shades for shades, _ in read(file)] == [list(shades) for shades in SHADES]


def folder(root: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """A folder with the lists' pictures; ``rows`` for its table."""
    root.mkdir(exist_ok=True)
    own = []
    for i, shades in enumerate(SHADES):
        names = [f"{i}-{j}.png" for j in range(len(shades))]
        for name, shade in zip(names, shades, strict=True):
            (root / name).write_bytes(encoded(shade))
        own.append({"file_names": names, "caption": f"caption {i}", "ranks": [-shade for shade in shades]})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or own))
    return root


def test_folders_hold_paths(tmp_path: Path) -> None:
    found = read(folder(tmp_path / "a"))
    assert [shades for shades, _ in found] == [list(shades) for shades in SHADES]
    assert found[2][1].judgement == load_examples(folder(tmp_path / "a"))[2].judgement  # type: ignore[index]


def test_what_is_not_ranked_is_left_out_and_counted(tmp_path: Path) -> None:
    scores = [[1.0, 1, 1], [2.0, 3], None, [1.0, 2, 3]]
    lists = load_examples(parquet(tmp_path / "a.parquet", table(scores=scores, caption=["a", "b", "c", " "])))
    assert lists.counts == {"rows": 4, "without label": 1, "ties": 1, "without caption": 1}
    assert lists.summary().lines() == ["1 lists of 2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [[1.0, 2, 3], [1.0], [1.0] * 4, [1.0] * 3]}, r"row 1: scores = \[1.0\] is wrong: expected a list"),
        ({"scores": [[1.0, 2, 3], [1.0, float("nan")], [1.0] * 4, [1.0] * 3]}, r"row 1: scores = \[1.0, nan\]"),
        ({"scores": ["a", "b", "c", "d"]}, r"row 0: scores = 'a' is wrong: expected a list of numbers"),
        ({"ranks": [[1, 2], [1, 2], [1] * 4, [1] * 3]}, r"row 0: 2 ranks and 3 scores: expected as many"),
        ({"ranks": [None, [1, 2], None, None], "scores": [[1.0, 2, 3], None, None, None]}, r"row 1: expected scores"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_wrong_row_is_named(tmp_path: Path, change: dict[str, Any], message: str, streaming: bool) -> None:
    file = parquet(tmp_path / "a.parquet", table(**change))
    with pytest.raises(ValueError, match=message):
        load_examples(file, streaming=streaming)


def test_a_picture_too_few_is_an_error(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", table(scores=[[3.0, 2, 1, 0], [1.0, 2], [1.0, 2, 3, 4], [1.0, 2, 3]]))
    lists = load_examples(file)
    assert isinstance(lists, PairDataset)
    with pytest.raises(ValueError, match=r"a\.parquet, row 0: 3 pictures and 4 scores: expected as many"):
        lists[0]
    rows = [{"file_names": ["0-0.png", "lost.png"], "caption": "a", "ranks": [1, 2]}]
    with pytest.raises(FileNotFoundError, match=r"row 0, column file_names\[1\]: image .*lost\.png cannot be read"):
        load_examples(folder(tmp_path / "b", rows))


# -- batches ---------------------------------------------------------------------------------------------------------


def checked(batch: PairBatch, pictures: int) -> None:
    """Every picture has the score and rank that its shade asks for; what is filled up is masked."""
    assert batch.pixels is not None
    assert batch.rank is not None
    assert batch.score is not None
    shades = ((batch.pixels[:, :, 0, 0, 0] + 1) / 2 * 255).round().T
    there = torch.ones_like(batch.rank, dtype=torch.bool) if batch.mask is None else batch.mask
    assert batch.pixels.shape == (pictures, len(batch), 3, 16, 16)
    assert torch.equal(batch.score[there], shades[there])
    for i, key in enumerate(batch.keys):
        own = SHADES[int(key.removeprefix("row "))]
        assert int(there[i].sum()) == min(pictures, len(own))
        ranks, scores = batch.rank[i][there[i]], batch.score[i][there[i]]
        assert torch.equal(ranks[:, None] < ranks[None], scores[:, None] > scores[None])


@pytest.mark.parametrize(("size", "pictures"), [(None, 4), (3, 3), (2, 2)])
@pytest.mark.parametrize("streaming", [False, True])
def test_lists_of_different_lengths_share_a_batch(
    tmp_path: Path, streaming: bool, size: int | None, pictures: int
) -> None:
    file = parquet(tmp_path / "a.parquet", table())
    data = load_examples(file, streaming=streaming)
    lists = sized_lists({3: 2, 2: 1, 4: 1}, size, "a")
    assert lists == ListSize(pictures, ragged=pictures > 2)
    loader: PairLoader | StreamLoader
    if isinstance(data, PairDataset):
        loader = PairLoader(PixelExamples(data, TRANSFORM, lists=lists), 4)
    else:
        loader = StreamLoader(data, TRANSFORM, 4, lists=lists)
    batches = iter(loader)
    for _ in range(2):
        checked(next(batches), pictures)


def test_longer_lists_show_others_at_other_visits(tmp_path: Path) -> None:
    data = load_examples(parquet(tmp_path / "a.parquet", table()))
    assert isinstance(data, PairDataset)
    examples = PixelExamples(data, TRANSFORM, lists=ListSize(2, ragged=False))
    shown = {tuple(examples.example(2, seed, False).score.tolist()) for seed in range(40)}  # type: ignore[union-attr]
    assert shown == {(7.0, 7.0), (7.0, 90.0), (7.0, 60.0), (90.0, 60.0)}
    first, again = (examples.example(2, 5, False) for _ in range(2))
    assert torch.equal(first.pixels, again.pixels)  # type: ignore[arg-type]


def test_lists_whose_lengths_are_unknown_need_a_size() -> None:
    with pytest.raises(ValueError, match=r"hub/lists: .* set list_size"):
        sized_lists(None, None, "hub/lists")
    assert sized_lists(None, 4, "hub/lists") == ListSize(4, ragged=True)


def test_a_cache_gives_the_same_lists(tmp_path: Path, adapter: Adapter) -> None:
    file = parquet(tmp_path / "a.parquet", table())
    data = load_examples(file)
    assert isinstance(data, PairDataset)
    cached = build_cache(adapter, data, TRANSFORM, tmp_path / "cache", workers=0, list_size=3)
    require_same_data(cached, load_examples(file, streaming=True))
    assert (cached.unit, cached.summary(), cached.lists) == ("ranked lists", data.summary(), ListSize(3, ragged=True))
    assert len({name for pair in cached.pairs for name in pair["images"]}) == 11  # 7 is there twice
    lists = sized_lists({3: 2, 2: 1, 4: 1}, 3, "a")
    loaders = [PairLoader(cached, 4), PairLoader(PixelExamples(data, TRANSFORM, lists=lists), 4)]
    for number in range(2):
        ours, theirs = (loader.load(number) for loader in loaders)
        for name in ("rank", "score", "mask", "weight", "seeds"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert ours.posterior is not None
        assert ours.mask is not None
        assert torch.equal(ours.posterior[1].flatten(2).any(dim=2).T, ours.mask)
    assert CachedPairs(tmp_path / "cache").lists == ListSize(4, ragged=True)
    other = parquet(tmp_path / "b.parquet", table(scores=[[3.0, 2, 1], [1.0, 2], [1.0, 2, 3, 4], [1.0, 2, 3]]))
    with pytest.raises(CacheError, match=r"ranks: 2 differ, first .*row 0, then \[0, 2, 1\], now \[0, 1, 2\]"):
        require_same_data(cached, load_examples(other))
