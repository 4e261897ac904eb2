"""buildtools/mutants.py, and a sample of what buildtools/mutate.py does with them; all of it takes minutes."""

from __future__ import annotations

import subprocess
import sys

import mutate
import pytest
from mutants import mutants_of, mutated

SAMPLE, SEED = 15, 1


def changes(source: str) -> set[str]:
    return {f"{m.old} -> {m.new}" for m in mutants_of("file.py", source)}


@pytest.mark.parametrize(
    "source, expected",
    [
        ("a < b", {"a < b -> a <= b"}),
        ("x = 7", {"7 -> 8", "7 -> 6"}),
        ("a // b", {"a // b -> -(-a // b)", "a // b -> b // a"}),
        ("a - b", {"a - b -> a + b", "a - b -> b - a"}),
        ("min(a, b)", {"min(a, b) -> a", "min(a, b) -> b"}),
        ("a or not b", {"a or not b -> a and (not b)", "a or not b -> a", "a or not b -> not b", "not b -> b"}),
        ("a if b else c", {"a if b else c -> a", "a if b else c -> c"}),
        ("def f(a: Literal[1] = True) -> Literal[2]: 'text 3'", {"True -> False"}),
        ("raise ValueError(1 + 2)", set()),
    ],
)
def test_mutants(source: str, expected: set[str]) -> None:
    assert changes(source) == expected


def test_ceil_becomes_floor() -> None:
    assert "-(-a // b) -> a // b" in changes("-(-a // b)")


def test_only_the_expression_changes() -> None:
    source = "x = [\n    a,  # é\n    b + 1,\n]\n"
    (plus,) = (m for m in mutants_of("file.py", source) if m.old == "b + 1")
    assert mutated(source, plus) == "x = [\n    a,  # é\n    (b - 1),\n]\n"
    assert plus.name == "file.py | module | b + 1 -> b - 1" and plus.line == 3


def test_equals_have_numbers() -> None:
    names = [m.name for m in mutants_of("file.py", "def f(): return 1, 1")]
    assert names == [f"file.py | f | 1 -> {new}" for new in ("2", "0", "2 #2", "0 #2")]


def test_every_excuse_names_a_mutant_and_says_why() -> None:
    """That its mutant exists is checked by the run itself."""
    excused = mutate.read_equivalent(mutate.EQUIVALENT)
    assert excused and all(name.partition(" | ")[0] in mutate.TARGETS and reason for name, reason in excused.items())


def test_a_sample_is_killed() -> None:
    command = [sys.executable, mutate.__file__, "--sample", str(SAMPLE), "--seed", str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{SAMPLE} mutants: ")
