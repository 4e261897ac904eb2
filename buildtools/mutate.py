"""Mutation check of the scheduler and the paged-KV adapter: `python buildtools/mutate.py [--out FILE.json]`.

Each mutant is one small mistake (a bound off by one, `<` for `<=`, floor for ceil, swapped operands, a dropped arm of
min or max) in a temporary copy of the tree. The tests listed with its file must fail, or run out of time. Exit code 1
if a mutant survives that `equivalent_mutants.txt` does not excuse, or if an excuse names no mutant any more.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mutants import Mutant, mutants_of, mutated

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
            "tests/unit/test_validation.py::test_constants_of_the_device_are_the_specifications",
            "tests/unit/test_schedule.py",
        ),
        ("tests/unit/test_schedule_emulation.py::test_random_lengths[ascending]",),  # needs g++
    ),
    "flashmla_backend/paging.py": (("tests/unit/test_paging.py", "tests/unit/test_api_errors.py"),),
    "flashmla_backend/ragged.py": (("tests/unit/test_ragged.py",),),
    "flashmla_backend/integration/planner.py": (("tests/unit/test_planner.py", "tests/unit/test_bounds.py"),),
    "flashmla_backend/integration/sglang/steps.py": (("tests/sglang/test_steps.py",),),
}


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
            signal.alarm(round(limit_s) + 5)  # it must not outlive us for long, should we be killed
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
