"""Check what a built wheel holds: `python buildtools/check_wheel.py dist/*.whl`. Exit code 1 if anything is wrong."""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

DIST_INFO = r"flashmla_backend-[^/]+\.dist-info/"

REQUIRED = [
    r"flashmla_backend/__init__\.py",
    r"flashmla_backend/py\.typed",
    r"flashmla_backend/_native\.[^/]+\.so",
    r"flashmla_backend/integration/__init__\.py",
    r"flashmla_backend/integration/vllm/__init__\.py",
    r"flashmla_backend/integration/sglang/__init__\.py",
    DIST_INFO + r"METADATA",
    DIST_INFO + r"RECORD",
    DIST_INFO + r"WHEEL",
    DIST_INFO + r"entry_points\.txt",
    DIST_INFO + r"licenses/LICENSE",
]

# Anything that is neither required nor a Python module of the package does not belong in the wheel.
ALLOWED = [*REQUIRED, r"flashmla_backend/(\w+/)*\w+\.py"]


def faults(names: Iterable[str]) -> list[str]:
    """What is missing from, or has no place among, the file names of a wheel; [] if it is as it should be."""
    names = list(names)
    missing = [f"missing: {pattern}" for pattern in REQUIRED if not any(re.fullmatch(pattern, n) for n in names)]
    stray = [f"unexpected: {n}" for n in names if not any(re.fullmatch(pattern, n) for pattern in ALLOWED)]
    return missing + stray


def main(wheels: list[str]) -> int:
    """Check each wheel and print its faults; 0 if there are none."""
    if not wheels:
        print("usage: check_wheel.py WHEEL...", file=sys.stderr)
        return 2
    exit_code = 0
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            found = faults(archive.namelist())
        for fault in found:
            print(f"{Path(wheel).name}: {fault}")
        if not found:
            print(f"{Path(wheel).name}: ok, {Path(wheel).stat().st_size / 1024:.0f} KiB")
        exit_code |= bool(found)
    return exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
