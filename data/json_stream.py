"""JSON files read as a stream. What nests too deep is refused: a parser's memory grows with the square of the depth."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import ijson

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DEEPEST = 100  # brackets within each other; rows need a handful

_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_ALL_BUT_BRACKETS_AND_QUOTES = bytes(set(range(256)) - {ord('"'), *_STEP})
_ESCAPED = re.compile(rb"\\.", re.DOTALL)


def json_values(path: Path) -> Iterator[Any]:
    """The values of a JSON array, or those of JSON Lines one after the other, never the whole file at once.

    Raises ijson.JSONError where the JSON is broken, NestingError where it nests too deep.
    """
    with path.open("rb") as file:
        is_array = first_byte(file) == b"["
        prefix, source = "item" if is_array else "", ShallowJSON(file)
        yield from ijson.items(source, prefix, multiple_values=not is_array, use_float=True)


def first_byte(file: IO[bytes]) -> bytes:
    """The first byte that is not whitespace, the file being left at it."""
    if file.read(len(BYTE_ORDER_MARK)) != BYTE_ORDER_MARK:
        file.seek(0)
    while (byte := file.read(1)).isspace():
        pass
    file.seek(-len(byte), os.SEEK_CUR)
    return byte


class NestingError(ValueError):
    """Brackets nest deeper than `DEEPEST`; the message says up to which byte of the file."""


class ShallowJSON:
    """A file opened in binary for a JSON parser; `read` raises NestingError before the parser sees what nests too deep.

    Brackets within texts do not count. Takes 1 us a row of CounterFact, whose conversion takes 17.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._depth = 0
        self._rest = b""  # a text that the chunks so far have left open: its quote; after that, half an escape

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(size)
        levels = list(accumulate(map(_STEP.__getitem__, self._brackets(chunk)), initial=self._depth))
        if max(levels) > DEEPEST:
            raise NestingError(f"brackets nest more than {DEEPEST} deep before byte {self._file.tell()}")
        self._depth = levels[-1]
        return chunk

    def _brackets(self, chunk: bytes) -> bytes:
        """The brackets of the chunk that are not part of a text."""
        plain = _ESCAPED.sub(b"", self._rest + chunk)
        half = b"\\" if plain.endswith(b"\\") else b""
        parts = plain.translate(None, _ALL_BUT_BRACKETS_AND_QUOTES).split(b'"')  # outside, text, outside, ...
        self._rest = (b"" if len(parts) % 2 else b'"') + half
        return b"".join(parts[::2])
