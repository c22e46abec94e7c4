"""A leaderboard as a page, as Markdown, as CSV in full precision, and as LaTeX."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Final

from harness.report.drawing import Picture
from harness.report.leaderboard import COLUMNS, COSTS, GPU_PEAK, PEAK, SCORE_COLUMNS, SECONDS, Board, Cell, Group, Row
from harness.report.page import LEVEL, document, figure, table
from harness.watch import SCORE_NAMES, as_number

TITLE: Final = "Leaderboard"
HEADINGS: Final = {SECONDS: "seconds an edit", PEAK: "peak memory, GiB", GPU_PEAK: "GPU peak, GiB"}
LATEX: Final = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", "\n": " ", "\r": " ", "\t": " ",
}  # fmt: skip
LOWER: Final = ("LS_kl", "perplexity", *COSTS)  # is better
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
        "Means over records and seeds; percent where a score is a share. In brackets 95% bootstrap intervals over "
        "records: they say nothing of other orders of the facts, and one of no width says that these records do not "
        "differ, not that no other would. Without brackets, the least and the largest of the seeds."
    ]
    if tested:
        parts.append(
            "Bold: the highest mean of a column, and what is not significantly below it (two-sided paired sign-flip "
            f"test over records, p < {LEVEL}, Holm-corrected over all pairs of methods in the column; below it in "
            "every seed that both have, or in each pair of runs where they have none in common)."
        )
    if untested := [HEADINGS.get(name, name) for name in columns if name not in tested]:
        parts.append(f"Not tested, so never bold: {'; '.join(untested)}.")
    if "LS" in columns:
        parts.append("LS: best where it is the base model's on the facts of the same seeds.")
    if several := [name for name in LOWER if name in columns and name in SCORE_COLUMNS]:
        parts.append(f"{' and '.join(several)}: lower is better.")
    if "LS_kl" in columns:
        parts.append(
            "LS_kl is taken over the base model's likeliest tokens and one for the rest: the KL of all is no smaller."
        )
    if SECONDS in columns:
        parts.append("Seconds an edit are those of the edit turns, without warm-up, meta-training and scoring.")
    if any(PEAK in name for name in columns):
        parts.append("Peak memory is the largest of any seed.")
    if any(name not in row.cells for group in board.groups for row in group.rows for name in columns):
        parts.append("An empty cell: the runs have no such number.")
    return " ".join(parts)


def slug(title: str) -> str:
    """A title as a part of names of files and labels."""
    return re.sub(r"\W+", "_", title).strip("_")


def shown(name: str, value: float) -> str:
    if name == SECONDS:
        return f"{value:.3g}"
    if name in (PEAK, GPU_PEAK):
        return f"{value / 2**30:.2f}"
    return as_number(name, value)


def bounds(name: str, cell: Cell) -> str:
    """Its interval, in brackets; where it has none, how far seeds lie apart; nothing for what is the largest of any."""
    if cell.low is not None and cell.high is not None:
        return f"[{shown(name, cell.low)}, {shown(name, cell.high)}]"
    if name in (PEAK, GPU_PEAK) or not cell.by_seed:
        return ""
    least, most = (shown(name, of(cell.by_seed)) for of in (min, max))
    return "" if least == most else f"{least} to {most}"


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
    """A line a method, in full precision: shares of 1, nats, seconds, bytes.

    `..._by_seed` holds a number for each run, `bold` names the columns that are, `code` the commits.
    """
    scores = [name for name in board.columns if name in SCORE_COLUMNS]
    costs = [name for name in board.columns if name not in SCORE_COLUMNS]
    head = ["data", "model", "edits", "method", "seeds"]
    head += [f"{name}{part}" for name in scores for part in ("", "_low", "_high", "_by_seed")]
    head += [*costs, "bold", "code"]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for group in board.groups:
        for row in group.rows:
            numbers = [part for name in scores for part in _parts(row.cells.get(name))]
            numbers += [_parts(row.cells.get(name))[0] for name in costs]
            bold = " ".join(name for name in board.columns if name in row.cells and row.cells[name].bold)
            start = [group.data, group.model, group.edits, row.method, seeds(row)]
            writer.writerow([*start, *numbers, bold, "; ".join(row.codes)])
    return text.getvalue()


def _parts(cell: Cell | None) -> tuple[float | None, float | None, float | None, str]:
    """Mean, low, high, seeds; csv writes floats as they are read back, bit for bit, and None as an empty field."""
    if cell is None:
        return None, None, None, ""
    return cell.mean, cell.low, cell.high, " ".join(map(repr, cell.by_seed))


# ---------------------------------------------------------------------------------------------------------------------
# LaTeX


def latex(board: Board) -> str:
    r"""Two tables a group, to \input: scores, and costs. Intervals stand below their means, so that it is narrow."""
    lines = ["% needs \\usepackage{booktabs,graphicx}"]
    lines += [f"% {latex_text(line)}" for line in board.left_out]
    for group in board.groups:
        for what, columns in (("scores", SCORE_COLUMNS), ("costs", COSTS)):
            there = [name for name in columns if any(name in row.cells for row in group.rows)]
            if there:
                lines += ["", *_latex_table(group, what, there, caption(board) if what == "scores" else "")]
    return "\n".join(lines) + "\n"


def _latex_table(group: Group, what: str, names: Sequence[str], about: str) -> Iterator[str]:
    """Columns of a protocol stand side by side under its name; what is said of the numbers stands below."""
    names = sorted(names, key=_protocol_place)
    rows = [row for row in group.rows if any(name in row.cells for name in names)]
    yield r"\begin{table*}"
    yield r"\centering\small\setlength{\tabcolsep}{4pt}"
    yield rf"\caption{{{latex_text(f'{group.title}: {what}.')}}}"
    yield rf"\label{{tab:{slug(group.title)}-{what}}}"
    yield r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
    yield rf"\begin{{tabular}}{{l{'r' * (len(names) + 1)}}}"
    yield r"\toprule"
    yield from _latex_head(names)
    yield r"\midrule"
    for row in rows:
        cells = [(name, row.cells.get(name)) for name in names]
        means = [_cell(name, cell, lambda text: rf"\textbf{{{text}}}", lambda _: "") for name, cell in cells]
        between = [bounds(name, cell) if cell else "" for name, cell in cells]
        yield _latex_line([latex_text(row.method), *means, seeds(row)])
        if any(between):
            yield _latex_line(["", *(rf"{{\scriptsize {one}}}" if one else "" for one in between), ""])
    yield r"\bottomrule"
    yield r"\end{tabular}}"
    if notes := " ".join([about, *group.notes] if about else []):
        yield rf"\par\smallskip\parbox{{\linewidth}}{{\footnotesize {latex_text(notes)}}}"
    yield r"\end{table*}"


def _protocol_place(name: str) -> int:
    """Columns of one protocol together, in the order in which protocols first come."""
    return list(dict.fromkeys(one.partition("_")[0] for one in COLUMNS)).index(name.partition("_")[0])


def _latex_head(names: Sequence[str]) -> Iterator[str]:
    """A line of protocols over those of their forms, and rules between; with arrows to where better is."""
    spans = [(name, len(list(own))) for name, own in itertools.groupby(names, lambda one: one.partition("_")[0])]
    if any(protocol in SCORE_NAMES for protocol, _ in spans):
        over = [
            rf"\multicolumn{{{width}}}{{c}}{{{protocol if protocol in SCORE_NAMES else ''}}}"
            for protocol, width in spans
        ]
        yield _latex_line(["", *over, ""])
        ends = list(itertools.accumulate([1, *(width for _, width in spans)]))
        yield "".join(
            rf"\cmidrule(lr){{{start + 1}-{end}}}"
            for (protocol, _), start, end in zip(spans, ends, ends[1:], strict=False)
            if protocol in SCORE_NAMES
        )
    yield _latex_line(["method", *(_latex_heading(name) for name in names), "seeds"])


def _latex_heading(name: str) -> str:
    protocol, _, form = name.partition("_")
    words = (form or "tokens") if protocol in SCORE_NAMES else HEADINGS.get(name, name)
    arrow = r"$\downarrow$" if name in LOWER else r"$\uparrow$" if name in SCORE_COLUMNS and name != "LS" else ""
    return f"{latex_text(words)}{arrow}"


def _latex_line(cells: list[str]) -> str:
    r"""The first cell begins with {}: a bracket there would be read as an option of the line before."""
    return "{}" + " & ".join(cells) + r" \\"


def latex_text(text: str) -> str:
    return "".join(LATEX.get(one, one) for one in text)
