"""The command line of the report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.report import write_leaderboard, write_numbers, write_report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m harness.report", description="Pictures and tables of one run, or of several side by side."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, or one that holds several")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where to write; one run: its own folder")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--leaderboard",
        action="store_true",
        help="one table of methods instead, as HTML, Markdown, CSV and LaTeX, with pictures",
    )
    what.add_argument(
        "--numbers",
        action="store_true",
        help="copies of finished runs instead, with numbers and settings alone, into --to; reports take them as runs",
    )
    chosen = parser.parse_args(arguments)
    if chosen.numbers and chosen.to is None:
        parser.error("--numbers needs --to FOLDER, for the copies")
    try:
        write = write_leaderboard if chosen.leaderboard else write_numbers if chosen.numbers else write_report
        written = write(chosen.runs, chosen.to)
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{written}\n")


if __name__ == "__main__":
    main()
