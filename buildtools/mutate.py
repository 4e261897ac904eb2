"""Mutation check of the scheduler and the paged-KV adapter: `python buildtools/mutate.py [--out FILE.json]`.

Each mutant is one small mistake (a bound off by one, `<` for `<=`, floor for ceil, swapped operands, a dropped arm of
min or max) in a temporary copy of the tree. The tests listed with its file must fail, or run out of time. Exit code 1
if a mutant survives that `equivalent_mutants.txt` does not excuse, or if an excuse names no mutant any more.
"""

from __future__ import annotations

import argparse
import ast
import gc
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
EQUIVALENT = Path(__file__).parent / "equivalent_mutants.txt"
COPIED = ("flashmla_backend", "integration", "tests", "kernels", "pyproject.toml")
MAX_EXAMPLES = 60  # of a hypothesis test, and no shrinking: one failure is enough
LOG = "mutant.log"
LEAST_LIMIT_S = 5.0
SLOWER = 4  # times what the tests take without a mutant: then it loops for ever

Tests = tuple[str, ...]

# Groups of tests, quickest first; the next is run where one notices nothing. Paths as installed: integration/ becomes
# flashmla_backend/integration/.
TARGETS: dict[str, tuple[Tests, ...]] = {
    "flashmla_backend/schedule.py": (
        (
            "tests/unit/test_validation.py::test_constants_of_the_device_scheduler_are_the_specifications",
            "tests/unit/test_schedule.py",
        ),
        ("tests/unit/test_schedule_emulation.py::test_random_lengths[ascending]",),  # needs g++
    ),
    "flashmla_backend/paging.py": (("tests/unit/test_paging.py", "tests/unit/test_api_errors.py"),),
    "flashmla_backend/integration/planner.py": (("tests/unit/test_planner.py",),),
    "flashmla_backend/integration/sglang/steps.py": (("tests/sglang/test_steps.py",),),
}

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


@dataclass(frozen=True)
class Mutant:
    """Characters [begin, end) of a file replaced."""

    path: str
    function: str
    begin: int
    end: int
    old: str
    new: str
    line: int
    number: int = 0  # among those of the same name

    @property
    def name(self) -> str:
        """Survives changes elsewhere in the file, as its line would not."""
        ordinal = f" #{self.number + 1}" if self.number else ""
        return f"{self.path} | {self.function} | {self.old} -> {self.new}{ordinal}"


def variants(node: ast.AST) -> Iterator[ast.expr]:
    """What may stand in the place of an expression by mistake."""
    match node:
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value + 1)
            yield ast.Constant(value - 1)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARISONS:
            yield ast.Compare(left, [COMPARISONS[type(op)]()], [right])
        case ast.UnaryOp(op=ast.USub(), operand=ast.BinOp(ast.UnaryOp(ast.USub(), a), ast.FloorDiv(), b)):
            yield ast.BinOp(a, ast.FloorDiv(), b)  # ceil becomes floor
        case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=operand):
            yield operand
        case ast.BinOp(left=left, op=ast.FloorDiv() as op, right=right):
            yield ast.UnaryOp(ast.USub(), ast.BinOp(ast.UnaryOp(ast.USub(), left), op, right))  # floor becomes ceil
            yield ast.BinOp(right, op, left)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            yield ast.BinOp(left, OPERATORS[type(op)](), right)
            if isinstance(op, ast.Sub):
                yield ast.BinOp(right, op, left)
        case ast.BoolOp(op=op, values=values):
            yield ast.BoolOp(ast.And() if isinstance(op, ast.Or) else ast.Or(), values)
            for dropped in range(len(values)):
                rest = values[:dropped] + values[dropped + 1 :]
                yield rest[0] if len(rest) == 1 else ast.BoolOp(op, rest)
        case ast.IfExp(body=body, orelse=orelse):
            yield body
            yield orelse
        case ast.Call(func=ast.Name(id="min" | "max"), args=[first, second]):
            yield first
            yield second


def mutants_of(path: str, source: str) -> list[Mutant]:
    """All of a file, in its order. Annotations, texts and what follows `raise` are left alone."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found: list[Mutant] = []
    seen: Counter[str] = Counter()

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            function = node.name
        for variant in variants(node):
            assert isinstance(node, ast.expr) and node.end_lineno is not None and node.end_col_offset is not None
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            new = ast.unparse(ast.fix_missing_locations(deepcopy(variant)))
            mutant = Mutant(path, function, begin, end, ast.unparse(node), new, node.lineno)
            found.append(Mutant(**{**asdict(mutant), "number": seen[mutant.name]}))
            seen[mutant.name] += 1
        for name, value in ast.iter_fields(node):
            if isinstance(node, ast.Raise) or name in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child, function)

    visit(ast.parse(source), "module")
    return found


def mutated(source: str, mutant: Mutant) -> str:
    return f"{source[: mutant.begin]}({mutant.new}){source[mutant.end :]}"


def make_tree(folder: Path) -> None:
    """A copy of the tree with integration/ where an installation has it."""
    skipped = shutil.ignore_patterns("__pycache__", "*.so", "integration")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=skipped if name == "flashmla_backend" else None)
        else:
            shutil.copy(ROOT / name, folder / name)
    (folder / "integration").rename(folder / "flashmla_backend" / "integration")


def run_tests(tree: Path, tests: Tests) -> int:
    """pytest's exit code in this process, which must not have imported the package before."""
    import hypothesis
    import pytest

    whole = hypothesis.settings.__init__

    def few_examples(self: hypothesis.settings, parent: hypothesis.settings | None = None, **given: Any) -> None:
        given["max_examples"] = min(given.get("max_examples", MAX_EXAMPLES), MAX_EXAMPLES)
        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        whole(self, parent, **given | {"phases": phases, "derandomize": True, "database": None})

    hypothesis.settings.__init__ = few_examples  # type: ignore[method-assign]
    # An editable installation's finder would lead to the sources as they are.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True  # a file changed twice within a second would be taken from the cache
    os.chdir(tree)
    import flashmla_backend

    assert flashmla_backend.__file__ and Path(flashmla_backend.__file__).is_relative_to(tree), flashmla_backend.__file__
    # Without conftest.py: those of the engines' tests ignore tests that need no engine where there is none.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    return int(pytest.main(["-x", "-q", "--noconftest", "--assert=plain", "-p", "no:cacheprovider", *tests]))


def outcome(tree: Path, tests: Tests, limit_s: float) -> int | None:
    """pytest's exit code in a fork of this process, which has torch and pytest loaded; None past the time limit."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            os.setsid()
            with (tree / LOG).open("w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                code = run_tests(tree, tests)
        except BaseException as error:  # a mutant that does not even import
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def read_equivalent(path: Path) -> dict[str, str]:
    """name -> reason. Lines of `name: reason`; # begins a comment."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    pairs = [line.partition(" :: ") for line in lines if line and not line.startswith("#")]
    return {name.strip(): reason.strip() for name, _, reason in pairs}


def time_limits(paths: Iterable[str], tree: Path) -> dict[Tests, float]:
    """Seconds for each group of tests, which must pass as long as there is no mutant."""
    limits, log = {}, tree / LOG
    for tests in (tests for path in paths for tests in TARGETS[path]):
        start = time.monotonic()
        if code := outcome(tree, tests, 600):
            sys.exit(f"{tests} fail without a mutant (exit code {code}):\n{log.read_text()[-3000:]}")
        limits[tests] = max(LEAST_LIMIT_S, SLOWER * (time.monotonic() - start))
    return limits


def verdict_on(mutant: Mutant, tree: Path, limits: dict[Tests, float]) -> str:
    """Whether a group of tests fails or never ends in the tree, which holds the mutant."""
    for tests in TARGETS[mutant.path]:
        code = outcome(tree, tests, limits[tests])
        if code is None:
            return "timed out"
        if code not in (0, 1, 2):  # 2: it cannot even be imported
            sys.exit(f"pytest ended with {code} for {mutant.name}:\n{(tree / LOG).read_text()[-3000:]}")
        if code:
            return "killed"
    return "survived"


def check(mutants: Sequence[Mutant], excused: dict[str, str], tree: Path) -> list[dict[str, Any]]:
    """One record a mutant. Survivors are printed as they are found, and loops without end, to be looked at once."""
    limits = time_limits(dict.fromkeys(mutant.path for mutant in mutants), tree)
    records = []
    for mutant in mutants:
        file, start = tree / mutant.path, time.monotonic()
        source = file.read_text()
        file.write_text(mutated(source, mutant))
        verdict = "equivalent" if mutant.name in excused else verdict_on(mutant, tree, limits)
        file.write_text(source)
        seconds = round(time.monotonic() - start, 2)
        records.append({"mutant": mutant.name, "line": mutant.line, "verdict": verdict, "seconds": seconds})
        if verdict in ("survived", "timed out"):
            print(f"{verdict}: line {mutant.line}: {mutant.name}", flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description="Check that the tests notice mistakes in the scheduler and adapter.")
    parser.add_argument("--only", help="files whose path contains this")
    parser.add_argument("--sample", type=int, help="so many mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="name the mutants and run nothing")
    parser.add_argument("--out", type=Path, help="write a JSON report")
    parser.add_argument("--commit", help="for the report, where git cannot tell")
    arguments = parser.parse_args()

    excused = read_equivalent(EQUIVALENT)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve()
        make_tree(tree)
        everything = [m for path in TARGETS for m in mutants_of(path, (tree / path).read_text())]
        stale = sorted(excused.keys() - {m.name for m in everything})
        chosen = [m for m in everything if not arguments.only or arguments.only in m.path]
        if arguments.sample is not None:
            chosen = random.Random(arguments.seed).sample(chosen, min(arguments.sample, len(chosen)))
        if arguments.list:
            print(*(m.name for m in chosen), sep="\n")
            return
        import hypothesis.extra  # noqa: F401  once, for all forks
        import pytest  # noqa: F401
        import torch  # noqa: F401

        gc.freeze()  # pytest collects garbage when it ends, which in a fork copies all that was loaded
        records = check(chosen, excused, tree)
    for name in stale:
        print(f"excused, but there is no such mutant any more: {name}")
    counts = Counter(record["verdict"] for record in records)
    seconds = round(time.monotonic() - started, 1)
    print(f"{len(records)} mutants: {', '.join(f'{n} {verdict}' for verdict, n in counts.items())}; {seconds} s")
    if arguments.out:
        from flashmla_backend.bench.provenance import provenance, write

        command = ["python", "buildtools/mutate.py", *sys.argv[1:]]
        write(
            {**provenance("cpu", command, arguments.commit), **counts, "wall_s": seconds, "mutants": records},
            arguments.out,
        )
    sys.exit(bool(counts["survived"] or stale))


if __name__ == "__main__":
    main()
