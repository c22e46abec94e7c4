"""Text that second moments of keys are taken over, as windows of token ids, streamed: of files, or of questions."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, TextIO

from data.batches import PADDING
from data.disk import sha256_of
from data.prompts import PromptForm, Tokenizer
from data.records import Question, TokenSequence
from data.stream import AnswerTokens, tokenize

BLOCK = 1 << 16  # characters of a text file that are tokenised as one document, or a line more
JSON_LINES = (".jsonl", ".ndjson", ".json")
MOST_BYTES = 1 << 26  # of a line of JSON Lines
MOST_CHARACTERS = 16  # of a token, on average of a text
TOGETHER = 64  # documents
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # of a pair that stands for one, without the other half
SAMPLES = ("zsre_train.json", "fever_train.json", "wikibigedit_train.json", "ultraeditbench_train.json")


class Corpus(Protocol):
    """What second moments are taken over."""

    @property
    def name(self) -> str:
        """The setting that chose it."""

    @property
    def remedy(self) -> str:
        """What to do where there is too little of it."""

    @property
    def is_shipped(self) -> bool:
        """Whether it is the text that is taken where nobody brings one."""

    @property
    def sha256(self) -> str:
        """Of all that its tokens come from, but for the tokenizer."""

    def windows(self, tokenizer: Tokenizer, window: int, tokens: int) -> Iterator[TokenSequence]:
        """Its text cut every `window` tokens, up to `tokens` in all.

        Behind a window stands one token more that says nothing, since nothing is asked of a sequence's last one.
        """

    def total(self, tokens: int) -> int | None:
        """How many of `tokens` there will be; None where only reading tells."""


@dataclass(frozen=True)
class TextFiles:
    """`texts`: text files, or JSON Lines with a field `text`; `rows`: JSON arrays, of which every text counts."""

    texts: tuple[Path, ...]
    rows: tuple[Path, ...]
    name: str
    sha256: str
    is_shipped: bool = False
    remedy: str = "bring more text, `python -m data.prepare corpus` says how"

    def total(self, tokens: int) -> int | None:
        size = sum(path.stat().st_size for path in (*self.texts, *self.rows))
        return tokens if size > MOST_CHARACTERS * tokens else None

    def documents(self) -> Iterator[str]:
        """ValueError, naming file and line, for a row without text."""
        for path in self.texts:
            yield from _lines_of_json(path) if _is_json_lines(path) else _blocks(path)
        for path in self.rows:
            for row in json.loads(path.read_text(encoding="utf-8")):
                yield "\n".join(_strings(row))

    def windows(self, tokenizer: Tokenizer, window: int, tokens: int) -> Iterator[TokenSequence]:
        """Special tokens stand where the tokenizer puts them, around each document."""
        documents = iter(self.documents())
        read = iter(lambda: list(itertools.islice(documents, TOGETHER)), [])
        yield from _cut((ids for some in read for ids in tokenizer(some)["input_ids"]), window, tokens)


@dataclass(frozen=True)
class Questions:
    """Questions with their answers, tokenised as facts are, without ends."""

    questions: Callable[[], Iterable[Question]]
    form: PromptForm  # with what a chat template puts around a question, which no tokenizer's own hash knows
    answer_tokens: AnswerTokens
    name: str
    remedy: str
    is_shipped: ClassVar[bool] = False

    @cached_property
    def sha256(self) -> str:
        put = [*astuple(replace(self.form, end=None)), self.answer_tokens]
        digest = hashlib.sha256(json.dumps(put).encode())
        for question in self.questions():
            digest.update(json.dumps([question.prompt, question.answer]).encode())
        return digest.hexdigest()

    def total(self, tokens: int) -> int | None:
        return None

    def windows(self, tokenizer: Tokenizer, window: int, tokens: int) -> Iterator[TokenSequence]:
        left = iter(self.questions())
        read = iter(lambda: list(itertools.islice(left, TOGETHER)), [])
        put = (tokenize(some, tokenizer, self.answer_tokens, self.form) for some in read)
        documents = (sequence.without_end().ids for sequences in put for sequence in sequences)
        yield from _cut(documents, window, tokens)


def _cut(documents: Iterable[Sequence[int]], window: int, tokens: int) -> Iterator[TokenSequence]:
    left = tokens
    for ids in documents:
        for start in range(0, len(ids), window):
            cut = ids[start : start + window][:left]
            left -= len(cut)
            if cut:
                yield TokenSequence((*cut, PADDING), len(cut))
        if not left:
            return


def open_corpus(path: str | None, sample_dir: Path, tokens: int) -> TextFiles:
    """The corpus at `corpus.path`, None for the shipped texts, of which `tokens` will be read.

    ValueError where it is no text file, or has a row without text among those.
    """
    if path is None:
        texts: tuple[Path, ...] = (sample_dir / "passage.txt",)
        rows: tuple[Path, ...] = tuple(sample_dir / name for name in SAMPLES)
        return TextFiles(texts, rows, "corpus.path=null", _digest([*texts, *rows]), is_shipped=True)
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"corpus.path={path}: no such file; name a text file or JSON Lines with a field text")
    corpus = TextFiles((file,), (), f"corpus.path={path}", _digest([file], _is_json_lines(file)))
    read, has_text = 0, False
    for document in corpus.documents():
        read, has_text = read + len(document), has_text or bool(document.strip())
        if has_text and read > MOST_CHARACTERS * tokens:
            break
    if not has_text:
        raise ValueError(f"corpus.path={path}: holds no text; name another file, or set it to null")
    return corpus


def _digest(files: Sequence[Path], as_json_lines: bool = False) -> str:
    """Of the bytes and, where they are JSON Lines without ending in .jsonl or .json, of how they are read."""
    told = all(path.suffix in (".jsonl", ".json") for path in files)
    read = ["json lines"] if as_json_lines and not told else []
    return hashlib.sha256("\n".join([*map(sha256_of, files), *read]).encode()).hexdigest()


def _blocks(path: Path) -> Iterator[str]:
    """A text file in pieces of whole lines, of which one longer than a block is cut."""
    try:
        with path.open(encoding="utf-8") as file:
            while block := _block(file):
                yield block
    except UnicodeDecodeError as error:
        raise ValueError(f"corpus.path={path}: no UTF-8 ({error.reason}); name a plain text file") from error


def _block(file: TextIO) -> str:
    lines, size = [], 0
    while size < BLOCK and (line := file.readline(BLOCK)):
        lines.append(line)
        size += len(line)
    return "".join(lines)


def _is_json_lines(path: Path) -> bool:
    """By its name, or by a first line that is an object with a text."""
    if path.suffix.lower() in JSON_LINES:
        return True
    with path.open("rb") as file:
        first = next((line for line in iter(lambda: file.readline(MOST_BYTES), b"") if line.strip()), b"")
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "text" in row


def _lines_of_json(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_BYTES), b""), 1):
            if len(line) == MOST_BYTES:
                raise ValueError(
                    f"corpus.path={path}, line {number}: longer than {MOST_BYTES >> 20} MiB, which is no line of JSON "
                    "Lines; give each document a line of its own"
                )
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"corpus.path={path}, line {number}: not an object of JSON Lines; mend it") from error
            if not (isinstance(row, dict) and isinstance(row.get("text"), str)):
                raise ValueError(f"corpus.path={path}, line {number}: no text in a field 'text'; mend it")
            if HALF_CHARACTER.search(row["text"]):
                raise ValueError(
                    f"corpus.path={path}, line {number}: a text that is no Unicode, as if cut in the middle of a "
                    "character; mend it"
                )
            yield row["text"]


def _strings(value: Any) -> Iterator[str]:
    """Every text in a row, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)
