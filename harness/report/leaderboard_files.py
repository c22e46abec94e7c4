"""A leaderboard as a page, as Markdown, as CSV in full precision, and as LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Final

from harness.report.drawing import Picture
from harness.report.leaderboard import GPU_PEAK, PEAK, SCORE_COLUMNS, SECONDS, Board, Cell, Group, Row
from harness.report.page import LEVEL, document, figure, table
from harness.watch import as_number

TITLE: Final = "Leaderboard"
HEADINGS: Final = {SECONDS: "seconds an edit", PEAK: "peak memory, GiB", GPU_PEAK: "GPU peak, GiB"}
LATEX: Final = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", "\n": " ", "\r": " ", "\t": " ",
}  # fmt: skip
MARKDOWN: Final = {one: f"\\{one}" for one in "\\|*`<>[]"} | {"\n": " ", "\r": " "}


Drawn = Sequence[tuple[Picture, bytes]]  # with the PNG of each


def files(board: Board, drawn: Drawn) -> dict[str, str]:
    """The text of each file, by its name; the pictures are inside the page, and beside the Markdown."""
    return {
        "leaderboard.html": html(board, drawn),
        "leaderboard.md": markdown(board, drawn),
        "leaderboard.csv": comma_separated(board),
        "leaderboard.tex": latex(board),
    }


def caption(board: Board) -> str:
    """What a reader must know of the numbers, and of what is bold."""
    columns, tested = board.columns, board.tested
    parts = [
        "Means over records and seeds with 95% bootstrap intervals over records; percent where a score is a share."
    ]
    if tested:
        parts.append(
            "Bold: the highest mean of a column, and every method that the paired test does not show to be below it "
            f"(two-sided sign-flip test over records, Holm-corrected for the comparisons in the column, p < {LEVEL})."
        )
    if untested := [HEADINGS.get(name, name) for name in columns if name not in tested]:
        parts.append(f"Not tested, so never bold: {'; '.join(untested)}.")
    if several := [name for name in ("LS_kl", "perplexity") if name in columns]:
        parts.append(f"{' and '.join(several)}: lower is better; means over seeds.")
    if SECONDS in columns:
        parts.append("Seconds an edit are those of the edit turns, without warm-up, meta-training and scoring.")
    if any(PEAK in name for name in columns):
        parts.append("Peak memory is the largest of any seed.")
    if any(name not in row.cells for group in board.groups for row in group.rows for name in columns):
        parts.append("An empty cell: the runs have no such number.")
    return " ".join(parts)


def shown(name: str, value: float) -> str:
    if name == SECONDS:
        return f"{value:.3g}"
    if name in (PEAK, GPU_PEAK):
        return f"{value / 2**30:.2f}"
    return as_number(name, value)


def bounds(name: str, cell: Cell) -> str:
    """Its interval, in brackets; nothing where it has none."""
    return "" if cell.low is None or cell.high is None else f"[{shown(name, cell.low)}, {shown(name, cell.high)}]"


def headings(board: Board) -> list[str]:
    return ["method", *(HEADINGS.get(name, name) for name in board.columns), "seeds"]


def seeds(row: Row) -> str:
    return "" if row.seeds is None else str(row.seeds)


# ---------------------------------------------------------------------------------------------------------------------
# Page and Markdown


def html(board: Board, drawn: Drawn) -> str:
    body = [f"<h1>{TITLE}</h1>", f'<p class="note">{escape(caption(board))}</p>']
    for group in board.groups:
        body.append(f"<h2>{escape(group.title)}</h2>")
        rows = _rows(board, group, escape, lambda text: f"<b>{text}</b>", lambda text: f" <small>{text}</small>")
        body.append(table([escape(one) for one in headings(board)], rows, kind="stacked"))
        body += [f'<p class="note">{escape(note)}</p>' for note in group.notes]
    body += [f'<p class="warning">{escape(line)}</p>' for line in board.left_out]
    body += [figure(picture, png) for picture, png in drawn]
    return document(TITLE, body)


def markdown(board: Board, drawn: Drawn) -> str:
    def plain(text: str) -> str:
        return "".join(MARKDOWN.get(one, one) for one in text)

    head = headings(board)
    lines = [f"# {TITLE}", "", plain(caption(board))]
    for group in board.groups:
        lines += ["", f"## {plain(group.title)}", "", _line(head), _line(["---", *["---:"] * (len(head) - 1)])]
        lines += map(_line, _rows(board, group, plain, lambda text: f"**{text}**", lambda text: f" {text}"))
        lines += [line for note in group.notes for line in ("", plain(note))]
    lines += [line for one in board.left_out for line in ("", plain(one))]
    for picture, _ in drawn:
        lines += ["", f"## {picture.title}", "", f"![{picture.title}]({picture.name}.png)", "", plain(picture.caption)]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rows(
    board: Board,
    group: Group,
    plain: Callable[[str], str],
    bold: Callable[[str], str],
    small: Callable[[str], str],
) -> Iterator[list[str]]:
    for row in group.rows:
        yield [
            plain(row.method),
            *(_cell(name, row.cells.get(name), bold, small) for name in board.columns),
            seeds(row),
        ]


def _cell(name: str, cell: Cell | None, bold: Callable[[str], str], small: Callable[[str], str]) -> str:
    if cell is None:
        return ""
    mean, between = shown(name, cell.mean), bounds(name, cell)
    return (bold(mean) if cell.bold else mean) + (small(between) if between else "")


# ---------------------------------------------------------------------------------------------------------------------
# CSV


def comma_separated(board: Board) -> str:
    """A line a method, in full precision: shares of 1, nats, seconds, bytes; `bold` names the columns that are."""
    scores = [name for name in board.columns if name in SCORE_COLUMNS]
    costs = [name for name in board.columns if name not in SCORE_COLUMNS]
    head = ["data", "model", "edits", "method", "seeds"]
    head += [f"{name}{part}" for name in scores for part in ("", "_low", "_high")] + [*costs, "bold"]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for group in board.groups:
        for row in group.rows:
            numbers = [part for name in scores for part in _parts(row.cells.get(name))]
            numbers += [_parts(row.cells.get(name))[0] for name in costs]
            bold = " ".join(name for name in board.columns if name in row.cells and row.cells[name].bold)
            writer.writerow([group.data, group.model, group.edits, row.method, seeds(row), *numbers, bold])
    return text.getvalue()


def _parts(cell: Cell | None) -> tuple[float | None, float | None, float | None]:
    """Mean, low and high; csv writes floats as they are read back, bit for bit, and None as an empty field."""
    return (None, None, None) if cell is None else (cell.mean, cell.low, cell.high)


# ---------------------------------------------------------------------------------------------------------------------
# LaTeX


def latex(board: Board) -> str:
    r"""A table a group, to \input; intervals stand below their means, so that it is narrow."""
    lines = ["% needs \\usepackage{booktabs,graphicx}"]
    lines += [f"% {latex_text(line)}" for line in board.left_out]
    for group in board.groups:
        lines += ["", *_latex_table(board, group)]
    return "\n".join(lines) + "\n"


def _latex_table(board: Board, group: Group) -> Iterator[str]:
    yield r"\begin{table*}"
    yield r"\centering"
    about = " ".join([f"{group.title}.", *group.notes, caption(board)])
    yield rf"\caption{{{latex_text(about)}}}"
    yield r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
    yield rf"\begin{{tabular}}{{l{'r' * (len(board.columns) + 1)}}}"
    yield r"\toprule"
    yield _latex_line([latex_text(one) for one in headings(board)])
    yield r"\midrule"
    for row in group.rows:
        cells = [(name, row.cells.get(name)) for name in board.columns]
        means = [_cell(name, cell, lambda text: rf"\textbf{{{text}}}", lambda _: "") for name, cell in cells]
        between = [bounds(name, cell) if cell else "" for name, cell in cells]
        yield _latex_line([latex_text(row.method), *means, seeds(row)])
        if any(between):
            yield _latex_line(["", *(rf"{{\scriptsize {one}}}" if one else "" for one in between), ""])
    yield r"\bottomrule"
    yield r"\end{tabular}}"
    yield r"\end{table*}"


def _latex_line(cells: list[str]) -> str:
    r"""The first cell begins with {}: a bracket there would be read as an option of the line before."""
    return "{}" + " & ".join(cells) + r" \\"


def latex_text(text: str) -> str:
    return "".join(LATEX.get(one, one) for one in text)
