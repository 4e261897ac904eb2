"""SECURITY.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "SECURITY.md").read_text()


def test_every_test_named_is_there() -> None:
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", DOCUMENT)
    assert len(named) > 10
    for file, function in named:
        assert f"def {function}(" in (ROOT / file).read_text(), f"{file}::{function}"


def test_every_file_named_is_there() -> None:
    for file in re.findall(r"\b(?:buildtools|benchmarks|tests)/[\w/]+\.(?:py|txt)", DOCUMENT):
        assert (ROOT / file).is_file(), file
