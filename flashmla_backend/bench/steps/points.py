"""What is measured: a batch of requests, written as `64x512`, `8x32K` or, ragged, `4x32K+32x512`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flashmla_backend.errors import InvalidArgument


@dataclass(frozen=True)
class Point:
    """A batch that decodes."""

    name: str
    lengths: tuple[int, ...]  # tokens in the cache of each request when it is measured

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def parse(text: str) -> list[Point]:
    """Points separated by commas; `none` for no point. Raises InvalidArgument, naming the part that is none."""
    return [] if text == "none" else [_point(part) for part in text.split(",")]


def _point(text: str) -> Point:
    lengths: list[int] = []
    for part in text.split("+"):
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(K?)", part)
        if found is None:
            raise InvalidArgument(
                f"points has {text!r}; accepted: requests x tokens, as in 64x512 or 8x32K, joined by + into one batch"
            )
        requests, tokens, thousands = found.groups()
        lengths += [int(tokens) * (1024 if thousands else 1)] * int(requests)
    return Point(text, tuple(lengths))
