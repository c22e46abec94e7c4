"""The base model's and the edited model's own words, side by side.

    python -m harness.ask RUN "question" ...      # one table
    python -m harness.ask RUN                     # a question a line, until an empty one or Ctrl-D; also from a pipe
    python -m harness.ask RUN --json < questions.txt

RUN is a run's folder (its newest checkpoint, or that of --turn), the folder of one of its checkpoints, a delta that
`python -m harness.export --delta` wrote, or an exported model's folder. Both models write greedily, up to their own
end.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from harness.ask.edited import MAX_NEW_TOKENS, PROMPT_FORMS, Answers, open_edited
from harness.run.command import Parser, log_to_terminal
from harness.watch import as_said

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """A mistake of the user's ends in one line, and exit code 1."""
    log_to_terminal()
    try:
        work(parse(arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {as_typed(error)}")
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells have it


def as_typed(error: Exception) -> str:
    """In one line, with the options of this command for the keys of a run."""
    line = " ".join(str(error).split())
    return line.replace("model.name_or_path=", "--model ").replace("--prompt=", "--prompt ")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("harness.ask", __doc__)
    parser.add_argument("path", metavar="RUN", help="a run, a checkpoint of it, a delta, or an exported model")
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="none: they are read from the terminal")
    parser.add_argument("--turn", type=int, metavar="T", help="the state after T turns; default: the newest checkpoint")
    parser.add_argument(
        "--model",
        metavar="BASE",
        help="the base model, where its name has changed since the run; an exported model does not know it: without "
        "--model it is asked alone, with it both are held in memory",
    )
    form = "how questions are put; default: as the run does, else raw"
    parser.add_argument("--prompt", choices=PROMPT_FORMS, help=form)
    parser.add_argument(
        "--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help=f"default {MAX_NEW_TOKENS}"
    )
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="cpu, cuda, cuda:N; default: a GPU if any")
    parser.add_argument("--json", action="store_true", help="an object a line: question, base, edited")
    parser.add_argument("--trust-remote-code", action="store_true", help="for models that bring code; a run says it")
    return parser.parse_intermixed_args(arguments)  # questions stand anywhere behind the run


def work(chosen: argparse.Namespace) -> None:
    options: dict[str, Any] = vars(chosen).copy()
    path, questions, as_json = options.pop("path"), options.pop("questions"), options.pop("json")
    if any(not question.strip() for question in questions):
        raise ValueError("a question is blank: give it a text, or none at all to be asked for them")
    opened = open_edited(path, **options)
    log.info("%s; asked with --prompt %s", opened.about, opened.form)
    if opened.base is None:
        log.info("the base model is not known here: --model BASE puts its answers beside these")
    if questions:
        show(opened.ask(questions), as_json)
        return
    for question in typed():
        try:
            show(opened.ask([question]), as_json)
        except ValueError as error:  # the next one may be shorter
            log.error("%s", as_typed(error))


def typed() -> Iterator[str]:
    """Lines of stdin, without empty ones; on a terminal at a prompt, with a history, and up to an empty one."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is refused where it is asked, by itself
    if not sys.stdin.isatty():
        yield from filter(None, (line.strip().removeprefix("\ufeff") for line in sys.stdin))
        return
    prompted = sys.stdout.isatty()
    if prompted:
        import readline  # noqa: F401  what `input` then edits lines with

        log.info("one question a line; an empty line or Ctrl-D ends")
    while line := (_at_prompt() if prompted else sys.stdin.readline()).strip():
        yield line


def _at_prompt() -> str:
    try:
        return input("> ")
    except EOFError:
        sys.stdout.write("\n")
        return ""


def show(answers: Sequence[Answers], as_json: bool) -> None:
    if as_json:
        sys.stdout.writelines(f"{json.dumps(asdict(one), ensure_ascii=False)}\n" for one in answers)
        sys.stdout.flush()
        return
    Console(file=sys.stdout, force_terminal=sys.stdout.isatty()).print(as_table(answers))


def as_table(answers: Sequence[Answers]) -> Table:
    """A column a model; that of a base model nobody knows is left out."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), expand=True, show_lines=True)
    known = any(one.base is not None for one in answers)
    for heading in ("question", *["base model"] * known, "edited model"):
        table.add_column(heading, ratio=1, overflow="fold")
    for one in answers:
        table.add_row(*(as_said(text) for text in (one.question, one.base, one.edited) if text is not None))
    return table
