"""Write the tables of docs/performance.md and draw its plots, from the newest reports under benchmarks/results.

    python benchmarks/performance.py            # after a new kernels-h200-DATE.json, steps-... or any other it shows
    python benchmarks/performance.py --check    # change nothing; exit code 1 if the document is not of these reports

A table stands between `<!-- made: NAME -->` and `<!-- end -->`; all else is text, and is left alone. The plots go to
benchmarks/results/performance-*.png, and our time and the best rival's of each kernel report to the history there. Exit
code 2 where a report or matplotlib is missing, or the markers are not right.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from performance_plots import PLOTS, draw
from performance_reports import RESULTS, Reports, load, write_histories
from performance_tables import SECTIONS

from flashmla_backend.errors import Unsupported

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
SECTION = re.compile(r"(<!-- made: (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def filled(text: str, reports: Reports) -> str:
    """The document with its tables made anew. Raises ValueError where its markers are not SECTIONS, each once."""
    named = [match[2] for match in SECTION.finditer(text)]
    if sorted(named) != sorted(SECTIONS):
        raise ValueError(f"the document has tables {sorted(named)}; there must be, each once: {sorted(SECTIONS)}")
    return SECTION.sub(lambda match: f"{match[1]}{SECTIONS[match[2]](reports)}\n{match[3]}", text)


def stale(reports: Reports, document: Path = DOCUMENT, results: Path = RESULTS) -> list[str]:
    """What is not of these reports."""
    text = document.read_text()
    found = [] if filled(text, reports) == text else [document.name]
    digest = reports.digest().encode()
    found += [file for file in PLOTS if not (results / file).exists() or digest not in (results / file).read_bytes()]
    for file, history in reports.histories.items():
        kept = (results / file).read_text() if (results / file).exists() else ""
        found += [] if f'"{history[-1]["date"]}"' in kept else [file]
    return found


def main() -> int:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; say what is not of the newest reports")
    only_check = parser.parse_args().check
    try:
        return check(load()) if only_check else write(load())
    except (FileNotFoundError, Unsupported, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


def check(reports: Reports) -> int:
    old = stale(reports)
    for file in old:
        print(f"{file} is not of the newest reports: run python benchmarks/performance.py")
    return 1 if old else 0


def write(reports: Reports) -> int:
    text = filled(DOCUMENT.read_text(), reports)
    for path in draw(reports):
        print(path.name)
    write_histories(reports)
    DOCUMENT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
