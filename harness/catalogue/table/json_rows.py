"""The rows of a json file, one after another or in a list, as Python reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

BETWEEN_ROWS = " \t\r\n[,]"


def json_rows(text: str) -> Iterator[Any]:
    """Yield the rows of a text, which may be cut off.

    Raises:
        ValueError: what comes next is no whole row.
    """
    decoder, place = json.JSONDecoder(), 0
    while True:
        while place < len(text) and text[place] in BETWEEN_ROWS:
            place += 1
        if place == len(text):
            return
        row, place = decoder.raw_decode(text, place)
        yield row
