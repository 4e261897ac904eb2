"""A JSON record of a test run: what was run, on which device, and what failed."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from flashmla_backend.bench.provenance import provenance, write

TOTALS = ("tests", "cases", "failed", "skipped")


@dataclass
class Group:
    """The tests of one function."""

    tests: int = 0
    cases: int = 0  # what a test says it tried (`record_property("cases", n)`), else 1
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0


class Recorder:
    """A pytest plugin that writes `path` when the run ends."""

    def __init__(self, path: Path, command: list[str], commit: str | None) -> None:
        self.path, self.command, self.commit = path, command, commit
        self.started = time.time()
        self.groups: dict[str, Group] = {}
        self.failures: list[dict[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        group = self.groups.setdefault(report.nodeid.partition("[")[0], Group())
        group.seconds = round(group.seconds + report.duration, 2)
        if report.failed:
            group.failed += 1
            self.failures.append({"test": report.nodeid, "what": report.longreprtext[-1000:]})
        if report.skipped:
            group.skipped += 1
        elif report.when == "call":
            group.tests += 1
            group.cases += dict(report.user_properties).get("cases", 1)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failures.append({"test": report.nodeid, "what": report.longreprtext[-1000:]})

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
        groups = self.groups.values()
        totals = {field: sum(getattr(group, field) for group in groups) for field in TOTALS}
        record = {
            **provenance(device, self.command, self.commit),
            **totals,
            "exit_status": int(exitstatus),  # pytest's: 0 all passed, 1 some failed, 2 interrupted
            "wall_s": round(time.time() - self.started, 1),
            "groups": {name: asdict(group) for name, group in self.groups.items()},
            "failures": self.failures,
        }
        write(record, self.path)
