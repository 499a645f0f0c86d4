"""What holds for every command: results on stdout, the rest on stderr, --json, --quiet, exit statuses, quick help."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tqdm.auto import tqdm

from diffusion_align import quiet
from diffusion_align.cli import COMMANDS, main, overview
from diffusion_align.commands import console
from diffusion_align.commands.console import Progress, conclude, note, talking
from diffusion_align.quiet import progress_bar

PROMPT = "a large red star on a dark background"


def test_a_result_is_text_or_a_part_of_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    conclude("a.png", {"pictures": ["a.png"]})
    assert capsys.readouterr().out == "a.png\n"
    with talking(True, False) as talk:
        print("something else")
        conclude("a.png", {"pictures": ["a.png"]})
        conclude("b", {"more": 1})
    assert talk is not None
    assert json.loads(talk.text(0)) == {"pictures": ["a.png"], "more": 1}
    assert capsys.readouterr().out == ""


def test_what_a_command_prints_as_json_itself_is_kept_and_else_its_status_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with talking(True, False) as talk:
        print('{"own": 2}')
    assert talk is not None
    assert json.loads(talk.text(0)) == {"own": 2}
    with talking(True, False) as talk:
        print("words")
    assert talk is not None
    assert json.loads(talk.text(1)) == {"status": 1}
    assert capsys.readouterr().err == "words\n"
    with talking(True, False) as talk:
        conclude("table", [{"name": "a"}])
    assert talk is not None
    assert json.loads(talk.text(0)) == [{"name": "a"}]


def test_quiet_says_nothing_but_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with talking(False, True):
        note("a note")
        with Progress("work") as progress:
            progress("half", 1, 2)
        conclude("result", {})
    said = capsys.readouterr()
    assert (said.out, said.err) == ("result\n", "")
    assert main(["card", str(tmp_path / "none"), "--quiet"]) == 2
    assert "no such folder" in capsys.readouterr().err


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_is_a_line_every_30_seconds_where_nobody_looks() -> None:
    stream, seconds = io.StringIO(), iter([0.0, 10.0, 29.0, 31.0, 40.0])
    with Progress("drawing", stream=stream, clock=lambda: next(seconds)) as progress:
        for done in range(1, 6):
            progress("base", done, 5)
    assert stream.getvalue().splitlines() == ["drawing: base, 1 of 5", "drawing: base, 4 of 5"]


def test_bars_of_loops_are_lines_in_a_log_and_leave_no_trace_of_themselves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(every: float) -> list[str]:
        monkeypatch.setattr(quiet, "EVERY", every)
        with progress_bar(desc="steps", total=3, initial=1) as bar:
            bar.update()
            bar.set_postfix_str("loss=0.5", refresh=False)
            tqdm.write("a note", file=sys.stderr)
            bar.update()
        return capsys.readouterr().err.splitlines()

    assert told(30) == ["a note"]
    lines = told(0)
    assert lines[0].startswith("steps: 1 of 3")
    assert "a note" in lines
    assert not [line for line in lines if "\r" in line or "%" in line]
    assert any(line.endswith("loss=0.5") for line in lines)


def test_progress_is_a_bar_on_a_terminal_without_colours_where_none_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = {}
    for colours in (True, False):
        monkeypatch.delenv("NO_COLOR", raising=False)
        if not colours:
            monkeypatch.setenv("NO_COLOR", "1")
        stream = Terminal()
        with Progress("drawing", stream=stream) as progress:
            progress("base", 3, 5)
        shown[colours] = stream.getvalue()
    assert "3/5" in shown[True]
    assert "3/5" in shown[False]
    assert "\x1b[38;5" in shown[True] or "\x1b[3" in shown[True]
    assert "\x1b[38;5" not in shown[False]
    assert "\x1b[31m" not in shown[False]


def test_statuses_are_told_from_each_other(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusion_align.commands import export

    for error, status in ((ValueError("bad"), 2), (OSError("gone"), 2), (RuntimeError("failed"), 1)):
        monkeypatch.setattr(export, "run", _raising(error))
        assert main(["export", "x", "--format", "merged"]) == status
        assert capsys.readouterr().err == f"error: {error}\n"
        assert main(["export", "x", "--format", "merged", "--json"]) == status
        assert capsys.readouterr().out == ""  # an error is no result
    monkeypatch.setattr(export, "run", _raising(KeyboardInterrupt()))
    assert main(["export", "x", "--format", "merged"]) == 130
    monkeypatch.setenv("DIFFUSION_ALIGN_DEBUG", "1")
    monkeypatch.setattr(export, "run", _raising(ValueError("bad")))
    with pytest.raises(ValueError, match="bad"):  # with its traceback
        main(["export", "x", "--format", "merged"])


def _raising(error: BaseException) -> object:
    def run(options: object) -> int:
        raise error

    return run


def test_commands_that_do_not_end_have_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve-scorer", "scenes-oracle", "--json"]) == 2
    assert "runs until it is stopped" in capsys.readouterr().err


def test_the_overview_names_the_flags_of_every_command() -> None:
    for flag in ("--json", "--quiet", "NO_COLOR", "DIFFUSION_ALIGN_DEBUG"):
        assert flag in overview()


@pytest.mark.slow
def test_one_object_on_stdout_and_nothing_else(
    sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text(PROMPT)
    drawing = ["--model", str(sdxl_folder), "--num-inference-steps", "1", "--device", "cpu"]
    pictures = str(tmp_path / "pictures")
    lines = {
        "pictures": ["generate", PROMPT, *drawing, "--num-images", "1", "--out", pictures],
        "table": ["score", pictures, "--scorers", "scenes-oracle", "--out", str(tmp_path / "s.jsonl")],
        "pairs": ["annotate", str(tmp_path / "p.txt"), *drawing, "--scorers", "scenes-oracle", "--per-prompt", "2",
                  "--out", str(tmp_path / "annotated")],
        "plan": ["train", "dpo", "--config", "scenes_dpo", "--dry-run"],
    }  # fmt: skip
    for key, arguments in lines.items():
        assert main([*arguments, "--json"]) == 0
        assert key in json.loads(capsys.readouterr().out)
    assert Image.open(next((tmp_path / "pictures").glob("*.png"))).size[0] > 0
    assert isinstance(json.loads(_scorers(capsys)), list)


def _scorers(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["scorers", "--json"]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_no_help_imports_what_is_heavy() -> None:
    words = [[name] for name in COMMANDS] + [["evaluate", "a", "b"], ["evaluate", "scorer"], ["train", "dpo"]]
    code = (
        "import contextlib, io, sys\nfrom diffusion_align.cli import main\n"
        f"for words in {words!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        main([*words, '--help'])\n"
        "    heavy = {'torch', 'starlette', 'datasets', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "    assert not heavy, (words, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_room_says_what_it_exports() -> None:
    assert {"Progress", "conclude", "note", "talking"} == set(console.__all__)
