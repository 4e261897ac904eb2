"""`python -m tests.vllm.releases`: see the package."""

from __future__ import annotations

import sys
from pathlib import Path

from . import __doc__ as usage
from . import table
from .contract import our_needs, record

match sys.argv[1:]:
    case ["record", *folders] if folders:
        for folder in folders:
            print(table.write(record(Path(folder))))
    case ["table"]:
        table.put_into_readme(table.table(table.records(), our_needs()))
    case _:
        sys.exit(usage)
