"""Prompts with categories, in the layouts that their own repositories have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffusion_align.commands.evaluating.prompt_sets import load_set


def test_partiprompts_are_read_from_their_table(tmp_path: Path) -> None:
    file = tmp_path / "PartiPrompts.tsv"
    file.write_text('Prompt\tCategory\tChallenge\tNote\na "cat", wet\tAnimals\tBasic\t\nbond\tAbstract\tBasic\tx\n')
    found = load_set(f"parti:{file}")
    assert list(found.prompts) == ['a "cat", wet', "bond"]
    assert found.categories == {'a "cat", wet': "Animals", "bond": "Abstract"}
    assert load_set(str(file)) == found


def test_sets_of_a_file_for_each_category_are_read_from_their_folder(tmp_path: Path) -> None:
    for name in ("anime", "photo"):
        (tmp_path / f"{name}.json").write_text(json.dumps([f"{name} 1", f"{name} 2"]))
        (tmp_path / f"{name}_val.txt").write_text(f"{name} 3\n")
    found = load_set(f"hpdv2:{tmp_path}")
    assert found.categories["photo 2"] == "photo"
    assert len(found.prompts) == 4
    assert found.notes == ()
    found = load_set(f"t2i-compbench:{tmp_path}")
    assert found.categories == {"anime 3": "anime", "photo 3": "photo"}
    assert "not the T2I-CompBench score" in found.notes[0]


def test_geneval_s_prompts_are_not_the_geneval_score(tmp_path: Path) -> None:
    rows = [{"tag": "counting", "prompt": "two cups"}, {"tag": "colors", "prompt": "a red cup"}]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load_set(f"geneval:{tmp_path}")
    assert found.categories == {"two cups": "counting", "a red cup": "colors"}
    assert "prompts only, not the GenEval score" in found.notes[0]


def test_a_prompt_that_stands_there_twice_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.csv").write_text("prompt,style\na,x\n b ,y\na,x\n")
    found = load_set(str(tmp_path / "p.csv")).first(5)
    assert (list(found.prompts), found.categories) == (["a", "b"], {"a": "x", "b": "y"})
    assert "1 of 3 prompts stand there twice" in capsys.readouterr().err


def test_sets_that_are_not_there_say_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"evaluation_metadata\.jsonl.*geneval:PATH"):
        load_set("geneval")
    with pytest.raises(FileNotFoundError, match="none of the files"):
        load_set(f"hpdv2:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="did you mean 'geneval'"):
        load_set("genevall")
    (tmp_path / "p.jsonl").write_text('{"words": "a"}')
    with pytest.raises(ValueError, match="expected a column prompt"):
        load_set(str(tmp_path / "p.jsonl"))
