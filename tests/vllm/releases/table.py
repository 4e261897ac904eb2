"""The records beside this file, and README's table made from them."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

from flashmla_backend.integration.vllm import compat

from .contract import REPOSITORY, Needs, problems

FOLDER = Path(__file__).parent
README = REPOSITORY / "README.md"
HEAD = "| vLLM | checked against | Hopper | CPU | what it changed in calls of our classes |\n|---|---|---|---|---|\n"


def release_of(version: str) -> tuple[int, int]:
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def write(record: dict[str, Any]) -> Path:
    path = FOLDER / "{}.{}.json".format(*release_of(record["vllm"]))
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def records() -> list[dict[str, Any]]:
    """Oldest first."""
    found = [json.loads(path.read_text()) for path in FOLDER.glob("*.json")]
    return sorted(found, key=lambda record: release_of(record["vllm"]))


def table(made: list[dict[str, Any]], needs: Needs) -> str:
    """Markdown: a line for each release."""
    lines, before = [], None
    for record in made:
        release = release_of(record["vllm"])
        fits = {on_cpu: "no" if problems(record, needs, on_cpu=on_cpu) else "fits" for on_cpu in (False, True)}
        on_cpu = fits[True] if release >= compat.OLDEST_ON_CPU else "not served"
        changes = "; ".join(changed(before, record, needs)) if before else ""
        lines.append(f"| {release[0]}.{release[1]} | {record['vllm']} | {fits[False]} | {on_cpu} | {changes} |\n")
        before = record
    return HEAD + "".join(lines)


def changed(before: dict[str, Any], after: dict[str, Any], needs: Needs) -> list[str]:
    """What parameters the methods that we override gained and lost."""
    said = []
    for path in sorted(needs.overrides):
        old, new = (_names(record["names"].get(path)) for record in (before, after))
        words = [f"gains `{name}`" for name in new if name not in old]
        words += [f"loses `{name}`" for name in old if name not in new]
        if words:
            said.append(f"`{path.rpartition('.')[2]}` {', '.join(words)}")
    return said


def put_into_readme(made: str) -> None:
    text = README.read_text()
    README.write_text(re.sub(re.escape(HEAD) + r"(\|.*\n)*", lambda _: made, text))


def _names(parameters: str | None) -> list[str]:
    return list(inspect.signature(eval(f"lambda {parameters[1:-1]}: 0")).parameters) if parameters else []
