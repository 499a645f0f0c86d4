"""Requests that are not the studio's own page are refused, and answers tell nothing they should not."""

from __future__ import annotations

import asyncio
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from PIL import Image

from diffusion_align.cli import main
from diffusion_align.pictures import CorruptImageError
from diffusion_align.studio.serving.event_stream import EventStream
from diffusion_align.studio.sources.served_pictures import check_header
from tests.studio.killing import label_through_kills
from tests.studio.material import encoded, scored_table
from tests.studio.serving import Studio, studio

pytestmark = pytest.mark.slow
ROOM = Path(__file__).parents[2] / "diffusion_align" / "studio"
#: What must not reach a browser before a verdict.
FORBIDDEN = ("secret-model", "pickscore", "aesthetic", "score_", "model_", ".parquet", "jpg_0", "uid", "190-", "060-")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    home = tmp_path_factory.mktemp("home")
    scored_table(home / "pairs", 60)
    with studio(home, "--source", str(home / "pairs"), "--annotator", "ada", "--seed", "1") as running:
        yield running


def test_other_names_of_the_host_are_misdirected(served: Studio) -> None:
    for host in ("evil.example", f"evil.example:{served.port}", "127.0.0.1.evil.example", "", "169.254.1.1"):
        assert served.get("/label", Host=host).status == 421
    for host in (f"localhost:{served.port}", f"127.0.0.1:{served.port}", f"[::1]:{served.port}"):
        assert served.get("/label", Host=host).status == 200


def test_nothing_is_told_without_the_cookie(served: Studio) -> None:
    for path in ("/", "/label", "/assets/label.js", "/picture/abc", "/api/events", "/?token=wrong"):
        answer = served.raw("GET", path)
        assert answer.status == 403, path
        assert served.token.encode() not in answer.body
    assert served.raw("GET", "/label", {"Cookie": f"studio-{served.port}=wrong"}).status == 403


def test_the_launch_token_becomes_a_strict_cookie_and_leaves_the_address(served: Studio) -> None:
    answer = served.raw("GET", served.address.removeprefix(served.origin))
    assert answer.headers["location"] == "/label"
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(answer.headers["set-cookie"].split("; "))


@pytest.mark.parametrize(
    "changed",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://127.0.0.1:1"},
        {"X-Studio-Token": ""},
        {"X-Studio-Token": "wrong"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=str,
)
def test_writes_from_elsewhere_are_refused(served: Studio, changed: dict[str, str]) -> None:
    assert served.raw("POST", "/api/label-next", {**served.write_headers(), **changed}, b"{}").status == 403


def test_reads_for_other_sites_are_refused(served: Studio) -> None:
    for site in ("cross-site", "same-site"):
        assert served.get("/label", **{"Sec-Fetch-Site": site}).status == 403


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd", "/assets/../shell.html", "/assets/..%2f..%2fcli.py", "/picture/..%2F..%2Fetc%2Fpasswd",
        "/picture/../../../etc/passwd", "//etc/passwd", "/assets/shell.html", "/label/../../x", "/picture/%2e%2e%2fx",
    ],
)  # fmt: skip
def test_paths_lead_nowhere(served: Studio, path: str) -> None:
    assert served.get(path).status == 404


def test_bodies_are_small_json_objects(served: Studio) -> None:
    big = json.dumps({"x": "y" * 70_000}).encode()
    assert served.raw("POST", "/api/label-next", served.write_headers(), big).status == 413
    for body in (b"[]", b"{", b"\xff", b'"x"', b"[" * 60_000):
        assert served.raw("POST", "/api/label-next", served.write_headers(), body).status == 400
    assert served.raw("PUT", "/api/label-next", served.write_headers(), b"{}").status == 405
    assert served.post("no-such-action").status == 404


def test_every_answer_carries_the_policy(served: Studio) -> None:
    for answer in (
        served.get("/label"),
        served.get("/nothing/there"),
        served.raw("GET", "/"),
        served.post("label-next"),
    ):
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers
        assert "server" not in answer.headers


def test_sources_outside_the_roots_are_refused(served: Studio, tmp_path: Path) -> None:
    scored_table(tmp_path / "outside", 2)
    for source in (str(tmp_path / "outside"), "../..", "/etc"):
        answer = served.post("label-begin", name="other", sources=[source])
        assert answer.status == 404, answer.body
    assert served.post("data-page", table="../../..").status == 404
    for name in ("../x", "/tmp/x", ".hidden"):
        assert served.post("label-next", task=name).status == 400
        assert served.post("label-next", annotator=name).status == 400


def test_links_that_lead_out_of_the_roots_are_not_followed(tmp_path: Path) -> None:
    home, outside = tmp_path / "home", tmp_path / "outside"
    scored_table(home / "pairs", 2)
    scored_table(outside, 2)
    (home / "link").symlink_to(outside)
    with studio(home) as running:
        assert running.ask("data-sources")["tables"] == ["pairs"]
        assert running.post("data-page", table="link").status == 404
        assert running.post("label-begin", sources=["link"]).status == 404


def test_twenty_pairs_arrive_without_a_word_about_them(served: Studio) -> None:
    served.seen.clear()
    state = served.ask("label-next", annotator="blind")
    page = served.get("/label")
    before = set()
    for _ in range(20):
        visit = state["visits"][0]
        assert set(visit) == {"id", "prompt", "pictures"}
        for name in visit["pictures"]:
            answer = served.get(f"/picture/{name}")
            assert answer.headers["content-type"] == "image/jpeg"
            assert "etag" not in answer.headers
            assert "last-modified" not in answer.headers
        before |= {visit["id"], *visit["pictures"]}
        state = served.ask("label-verdict", annotator="blind", visit=visit["id"], choice="left", ms=500)
    assert page.status == 200
    assert len(before) == 60
    for answer in served.seen:
        told = repr(sorted(answer.headers.items())).encode() + answer.body
        assert not [text for text in FORBIDDEN if text.encode() in told.lower()], told[:300]


def test_metadata_of_pictures_stays_on_the_server(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    for place, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        told = PngInfo()
        told.add_text("diffusion-align", json.dumps({"prompt": "a star", "seed": 3, "model": "secret-model"}))
        told.add_text("parameters", "a star\nSteps: 4, Sampler: DDIM, CFG scale: 5, Seed: 3, Model: secret-model")
        Image.new("RGB", (8, 8), (90 * place, 0, 0)).save(tmp_path / name / f"{name}.png", pnginfo=told)
    flags = ["--source", str(tmp_path / "one"), str(tmp_path / "two")]
    with studio(tmp_path, *flags) as running:
        visit = running.ask("label-next")["visits"][0]
        for name in visit["pictures"]:
            answer = running.get(f"/picture/{name}")
            assert b"secret" not in answer.body
            assert b"tEXt" not in answer.body
            assert answer.headers["content-type"] == "image/png"
        running.ask("label-verdict", visit=visit["id"], choice="left", ms=400)
        models = {found["model"] for found in running.ask("label-summary")["models"]}
        assert "record" in running.ask("label-summary")["rule"]
    assert models == set() or models == {"secret-model"}


def test_verdicts_survive_kills_of_the_server(tmp_path: Path) -> None:
    """Fifty kills are in tests/faults (make test-faults)."""
    label_through_kills(tmp_path, 2)


def test_a_verdict_that_is_sent_again_counts_once(served: Studio) -> None:
    visit = served.ask("label-next", annotator="twice")["visits"][0]["id"]
    first = served.ask("label-verdict", annotator="twice", visit=visit, choice="left", ms=500)
    assert served.ask("label-verdict", annotator="twice", visit=visit, choice="right", ms=500) == first
    assert first["done"] == 1
    assert served.ask("label-undo", annotator="twice")["done"] == 0


def test_two_annotators_at_once_get_different_pairs(served: Studio) -> None:
    first = served.ask("label-next", annotator="eve")
    second = served.ask("label-next", annotator="bob")
    assert not {visit["id"] for visit in first["visits"]} & {visit["id"] for visit in second["visits"]}
    prompts = [{visit["prompt"] for visit in state["visits"]} for state in (first, second)]
    assert len(prompts[0] & prompts[1]) <= 3


def test_another_studio_on_the_folder_is_told_who_has_it(served: Studio, capsys: pytest.CaptureFixture[str]) -> None:
    home = next(Path(arg) for arg in served.process.args if Path(str(arg)).is_dir())  # type: ignore[union-attr]
    assert main(["studio", str(home), "--no-browser"]) == 2
    assert f"pid {served.process.pid}" in capsys.readouterr().err


def test_other_addresses_are_refused_with_a_way_round(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["studio", ".", "--host", "0.0.0.0"]) == 2
    assert "ssh -L" in capsys.readouterr().err


def test_the_server_is_small_and_has_no_torch(served: Studio) -> None:
    served.ask("label-next", annotator="ada")
    maps = Path(f"/proc/{served.process.pid}/maps").read_text()
    assert "torch" not in maps
    assert psutil.Process(served.process.pid).memory_info().rss < 150 * 2**20
    assert len(served.process.args) > 1


def test_the_server_starts_quickly(tmp_path: Path) -> None:
    code = "import time; t = time.process_time(); import uvicorn, diffusion_align.studio.assembly"
    code += "; print(time.process_time() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.5


def test_help_loads_neither_the_server_nor_torch() -> None:
    code = "import sys; from diffusion_align.cli import parse; parse(['studio', 'x'])"
    code += "; print(sorted({'torch', 'starlette', 'uvicorn', 'pyarrow', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_starlettes_risky_parts_are_not_used() -> None:
    text = "\n".join(path.read_text() for path in ROOM.rglob("*.py"))
    assert not re.findall(r"StaticFiles|FileResponse|\.form\(|multipart", text)


def test_svg_is_never_a_picture(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>")
        (tmp_path / name / "a.txt").write_text("a star")
    (tmp_path / "two" / "a.png").write_bytes(encoded(10, 1, kind="PNG"))
    with studio(tmp_path, "--source", str(tmp_path / "one"), str(tmp_path / "two")) as running:
        visit = running.ask("label-next")["visits"][0]
        answers = [running.get(f"/picture/{name}") for name in visit["pictures"]]
        assert 422 in {answer.status for answer in answers}
        assert b"svg" not in b"".join(answer.body for answer in answers)
        assert b"one" not in b"".join(answer.body for answer in answers if answer.status == 422)


def test_more_pixels_than_the_cap_are_refused_by_the_header_alone() -> None:
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    with pytest.raises(CorruptImageError, match="has 9000x9000 pixels: expected at most 64,000,000"):
        check_header(buffer.getvalue()[:64], "a picture")  # nothing behind the header is needed


def test_a_tab_that_comes_back_gets_what_it_has_missed_and_heartbeats() -> None:
    async def heard(count: int, last: int | None) -> list[bytes]:
        return [await anext(following) for following in [stream.follow(last)] for _ in range(count)]

    stream = EventStream(heartbeat=0.01)
    for number in range(4):
        stream.send("run", run=str(number))
    with ThreadPoolExecutor(1) as thread:  # the browser's tests leave a loop in this one
        found, fresh = thread.map(asyncio.run, [heard(4, 2), heard(2, None)])
    assert [event.partition(b"\n")[0] for event in found] == [b"retry: 1000", b"id: 3", b"id: 4", b": still here"]
    assert found[1].endswith(b'data: {"kind": "run", "run": "2"}\n\n')
    assert fresh[1] == b": still here\n\n"


def test_events_are_resumed_by_their_number(served: Studio) -> None:
    start = time.monotonic()
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
    connection.request("GET", "/api/events", headers={"Cookie": served.cookie, "Last-Event-ID": "99"})
    answer = connection.getresponse()
    assert answer.getheader("content-type", "").startswith("text/event-stream")
    assert answer.read1() == b"retry: 1000\n\n"
    connection.close()
    assert time.monotonic() - start < 9
