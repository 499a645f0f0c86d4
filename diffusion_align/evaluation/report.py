"""A report is one HTML file that can be mailed or archived: pictures inside it, no scripts, no outside resources."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion_align.files import write_whole
from diffusion_align.showing import page_html, shortened

from .figures import COLOURS, SHOWN_SIDE, image_grid
from .line_chart import line_chart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --muted: #59636e; --paper: #ffffff; --card: #f6f8fa; --rule: #d8dee4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --muted: #9198a1; --paper: #0d1117; --card: #161b22; --rule: #30363d }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 system-ui, sans-serif }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.9rem; line-height: 1.25; margin: 0 0 1.5rem }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--rule) }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem }
p, ul { margin: 0 0 1rem; max-width: 46rem }
code { font: .9em ui-monospace, monospace; background: var(--card); padding: .1em .35em; border-radius: 4px }
.scroll { overflow-x: auto; margin: 0 0 1.5rem }
table { border-collapse: collapse; font-size: .94rem; font-variant-numeric: tabular-nums }
th, td { padding: .4rem 1.1rem .4rem 0; text-align: left; border-bottom: 1px solid var(--rule); vertical-align: top }
td:first-child { min-width: 8rem }
th { color: var(--muted); font-weight: 600 }
td.number, th.number { text-align: right }
figure { margin: 1.5rem 0 2rem }
figure img { max-width: 100%; height: auto; display: block; background: #ffffff; border-radius: 6px;
  border: 1px solid var(--rule) }
figure.chart { display: inline-block; margin: .5rem 1rem 1rem 0; max-width: 100% }
figure.chart svg { max-width: 100%; height: auto; display: block; font: 11px system-ui, sans-serif; fill: var(--muted) }
figure.chart line.rule { stroke: var(--rule) }
.legend span { margin-right: 1rem; font-size: .85rem }
.legend i { display: inline-block; width: .9rem; height: .2rem; margin-right: .35rem; vertical-align: middle }
figure.sheet { overflow-x: auto }
.cells { display: flex; flex-wrap: wrap; gap: .75rem .5rem; margin: 0 0 1.25rem }
.cell { width: min(12rem, calc(50% - .25rem)); font-size: .85rem; line-height: 1.35; overflow-wrap: anywhere }
.cell img { width: 100%; margin-bottom: .25rem }
.best, td.best { font-weight: 600 }
.cell.best img { outline: 3px solid #009e73 }
figcaption { color: var(--muted); font-size: .9rem; margin-top: .5rem; max-width: 46rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.5rem; margin: 0 0 1.5rem;
  padding: 1rem 1.25rem; background: var(--card); border-radius: 6px; font-size: .94rem }
dt { color: var(--muted) }
dd { margin: 0; overflow-wrap: anywhere }
"""

#: Of a picture with text in it, on screens that are narrower, in pixels.
LEAST_WIDTH = 560
#: What the best of several stands beside.
STAR = "★ "


@dataclass(frozen=True)
class _Picture:
    name: str
    png: bytes
    width: int
    caption: str

    def html(self) -> str:
        data, caption = base64.b64encode(self.png).decode("ascii"), escape(self.caption)
        # On a phone a sheet with text in it is moved sideways rather than made too small to read.
        least = min(self.width, LEAST_WIDTH)
        return (
            f'<figure class="sheet"><img src="data:image/png;base64,{data}" alt="{caption}" width="{self.width}" '
            f'style="min-width:{least}px"><figcaption>{caption}</figcaption></figure>'
        )


class Report:
    """Collects blocks in reading order and writes them as ``report.html`` plus one PNG file per picture.

    Everything given to it is shown as text: HTML in a prompt or a caption is escaped, never interpreted. Every method
    but :meth:`write` returns the report, so calls can be chained.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._blocks: list[str] = []
        self._pictures: list[_Picture] = []

    def text(self, text: str) -> Report:
        """Paragraphs parted by empty lines; ``## `` and ``### `` headings, ``- `` lists, ``**bold**``, `` `code` ``."""
        for part in re.split(r"\n\s*\n", text.strip()):
            lines = [line.strip() for line in part.splitlines()]
            while lines and (heading := re.match(r"(##|###) +(.+)", lines[0])):
                level = len(heading[1])
                self._blocks.append(f"<h{level}>{_inline(heading[2])}</h{level}>")
                lines = lines[1:]
            if lines and all(line.startswith("- ") for line in lines):
                items = "".join(f"<li>{_inline(line[2:])}</li>" for line in lines)
                self._blocks.append(f"<ul>{items}</ul>")
            elif any(lines):
                self._blocks.append(f"<p>{_inline(' '.join(lines))}</p>")
        return self

    def table(self, rows: Sequence[Mapping[str, object]], best: Collection[tuple[int, str]] = frozenset()) -> Report:
        """A table with one line per mapping; the first row's keys are the header. Floats get four significant digits.
        Cells in ``best``, by row and column, are marked.

        Raises ``ValueError`` for no rows, or naming the row and the keys when a row's keys differ from the first's.
        """
        if not rows:
            raise ValueError("rows: expected at least one row, got none")
        columns = list(rows[0])
        for index, row in enumerate(rows):
            if set(row) != set(columns):
                missing, extra = sorted(set(columns) - set(row)), sorted(set(row) - set(columns))
                raise ValueError(f"rows[{index}]: expected columns {columns}; missing {missing}, unexpected {extra}")
        numeric = {column: all(_is_number(row[column]) for row in rows) for column in columns}

        def cell(tag: str, column: str, text: str, starred: bool = False) -> str:
            kinds = " ".join(kind for kind, given in (("number", numeric[column]), ("best", starred)) if given)
            told = f' class="{kinds}"' if kinds else ""
            return f"<{tag}{told}>{STAR if starred else ''}{escape(text)}</{tag}>"

        def line(number: int, row: Mapping[str, object]) -> str:
            return "".join(cell("td", name, _shown(row[name]), (number, name) in best) for name in columns)

        body = "".join(f"<tr>{line(number, row)}</tr>" for number, row in enumerate(rows))
        head = f"<thead><tr>{''.join(cell('th', name, name) for name in columns)}</tr></thead>"
        self._blocks.append(f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>')
        return self

    def facts(self, facts: Mapping[str, object]) -> Report:
        """Names and values in a box: settings, versions, times. Raises ``ValueError`` when empty."""
        if not facts:
            raise ValueError("facts: expected at least one name and value, got none")
        items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(_shown(value))}</dd>" for name, value in facts.items())
        self._blocks.append(f"<dl>{items}</dl>")
        return self

    def figure(self, figure: Figure, caption: str) -> Report:
        """A matplotlib figure, drawn now: later changes to it do not show."""
        buffer = io.BytesIO()
        # Without the library's version inside, equal figures are equal files.
        figure.savefig(buffer, format="png", metadata={"Software": None})
        self._blocks.append(self._keep(buffer.getvalue(), round(figure.get_figwidth() * 100), caption).html())
        return self

    def chart(
        self, series: Mapping[str, Sequence[tuple[float, float]]], caption: str, smooth: int = 1, xlabel: str = "step"
    ) -> Report:
        """Curves of (step, value) points as ``line_chart`` draws them: sharp, and made in no time. Several have a
        legend; charts that follow each other share a line where there is room."""
        names = "".join(
            f'<span><i style="background:{COLOURS[index % len(COLOURS)]}"></i>{escape(name)}</span>'
            for index, name in enumerate(series)
        )
        legend = f'<div class="legend">{names}</div>' if len(series) > 1 else ""
        drawn = line_chart(series, smooth, xlabel)
        self._blocks.append(f'<figure class="chart">{drawn}{legend}<figcaption>{escape(caption)}</figcaption></figure>')
        return self

    def image(self, image: Image.Image, caption: str) -> Report:
        """A PIL picture, encoded now as PNG and shown at its own size or the page's width."""
        self._blocks.append(self._keep(_png(image), image.width, caption).html())
        return self

    def pictures(
        self, rows: Sequence[Sequence[NDArray[np.uint8]]], row_labels: Sequence[str], column_labels: Sequence[str],
        caption: str, best: Sequence[int | None] = (),
    ) -> Report:  # fmt: skip
        """Pictures of equal size side by side, as many as there is room for, each row under its label.

        They are ``image_grid``'s, which is written as one PNG beside the page.

        Args:
            best: column that is marked in each row; None for none. Nothing given marks nothing.

        Raises:
            ValueError: as ``image_grid``.
        """
        marked = {(row, column) for row, column in enumerate(best) if column is not None}
        largest = max((side for row in rows for pixels in row for side in pixels.shape[:2]), default=1)
        sheet = image_grid(rows, row_labels, column_labels, max(1, SHOWN_SIDE // largest), best=marked)
        self._keep(_png(sheet), sheet.width, caption)
        lines = []
        for number, (pictures, label) in enumerate(zip(rows, row_labels, strict=True)):
            cells = "".join(
                _cell(pixels, name, f"{label}, {name}", (number, column) in marked)
                for column, (pixels, name) in enumerate(zip(pictures, column_labels, strict=True))
            )
            lines.append(f'<p>{escape(label)}</p><div class="cells">{cells}</div>')
        self._blocks.append(f"<figure>{''.join(lines)}<figcaption>{escape(caption)}</figcaption></figure>")
        return self

    def write(self, folder: str | Path) -> Path:
        """Write ``report.html`` and the PNG files into ``folder`` (made if absent); returns the HTML file's path.

        Each file is replaced whole, so a reader never sees half a report. Raises ``NotADirectoryError`` when
        ``folder`` is a file.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder}: expected a folder to write the report into, found a file")
        for picture in self._pictures:
            write_whole(folder / picture.name, picture.png)
        write_whole(folder / "report.html", self.html().encode("utf-8"))
        return folder / "report.html"

    def html(self) -> str:
        """The whole page."""
        title = escape(self.title)
        body = "\n".join(self._blocks)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n"
            f"<body>\n<main>\n<h1>{title}</h1>\n{body}\n</main>\n</body>\n</html>\n"
        )

    def __repr__(self) -> str:
        return f"Report({shortened(self.title)}, {len(self._blocks)} blocks, {len(self._pictures)} pictures)"

    def _repr_html_(self) -> str:
        return page_html(self.html())

    def _keep(self, png: bytes, width: int, caption: str) -> _Picture:
        slug = re.sub(r"[^a-z0-9]+", "-", caption.lower())[:40].strip("-") or "picture"
        picture = _Picture(f"{len(self._pictures) + 1:02d}-{slug}.png", png, width, caption)
        self._pictures.append(picture)
        return picture


def favourite(scores: Sequence[float]) -> int | None:
    """The place of the largest score; None where several are."""
    best = [place for place, score in enumerate(scores) if score == max(scores)]
    return best[0] if len(best) == 1 else None


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _cell(pixels: NDArray[np.uint8], name: str, told: str, best: bool) -> str:
    """A picture over its name."""
    data = base64.b64encode(_png(Image.fromarray(np.ascontiguousarray(pixels)))).decode("ascii")
    return (
        f'<div class="cell{" best" if best else ""}"><img src="data:image/png;base64,{data}" alt="{escape(told)}">'
        f"{STAR if best else ''}{escape(name)}</div>"
    )


def _inline(text: str) -> str:
    # Split on code first, so that stars inside code stay stars.
    parts = re.split(r"`([^`]+)`", text)
    return "".join(
        f"<code>{escape(part)}</code>" if odd else re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(part))
        for odd, part in ((index % 2 == 1, part) for index, part in enumerate(parts))
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
