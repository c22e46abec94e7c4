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
_HALF = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")  # as of a text cut within a pair of escapes
_ESCAPE = 6  # bytes of such an escape


def json_values(path: Path) -> Iterator[Any]:
    """The values of a JSON array, or those of JSON Lines one after the other, never the whole file at once.

    Raises ijson.JSONError where the JSON is broken, NestingError where it nests too deep, and HalfCharacterError.
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


class HalfCharacterError(ValueError):
    """A text has the first half of a character without the second, which ijson would read as a question mark."""


class ShallowJSON:
    """A file opened in binary for a JSON parser, which never sees what nests too deep, nor half a character.

    `read` raises NestingError or HalfCharacterError instead. Brackets within texts do not count. Takes 2 us a row of
    CounterFact, whose conversion takes 17.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._depth = 0
        self._rest = b""  # a text that the chunks so far have left open: its quote; after that, half an escape
        self._tail = b""  # of the chunks so far, where an escape may begin that goes on in the next

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(size)
        self._refuse_half_characters(chunk)
        levels = list(accumulate(map(_STEP.__getitem__, self._brackets(chunk)), initial=self._depth))
        if max(levels) > DEEPEST:
            raise NestingError(f"brackets nest more than {DEEPEST} deep before byte {self._file.tell()}")
        self._depth = levels[-1]
        return chunk

    def _refuse_half_characters(self, chunk: bytes) -> None:
        text = self._tail + chunk
        half = _HALF.search(text.replace(rb"\\", b"__"))  # of an odd number of backslashes the last begins an escape
        if half and (half.end() + _ESCAPE <= len(text) or not chunk):
            at = self._file.tell() - len(text) + half.start()
            raise HalfCharacterError(f"{half[0].decode()} at byte {at} is half a character")
        start = max(0, len(text) - 2 * _ESCAPE)
        while text[start - 1 : start] == b"\\":
            start -= 1
        self._tail = text[start:]

    def _brackets(self, chunk: bytes) -> bytes:
        """The brackets of the chunk that are not part of a text."""
        plain = _ESCAPED.sub(b"", self._rest + chunk)
        half = b"\\" if plain.endswith(b"\\") else b""
        parts = plain.translate(None, _ALL_BUT_BRACKETS_AND_QUOTES).split(b'"')  # outside, text, outside, ...
        self._rest = (b"" if len(parts) % 2 else b'"') + half
        return b"".join(parts[::2])
