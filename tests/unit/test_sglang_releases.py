"""Every supported release of SGLang has what our plugin uses of it, by a record of the releases' Python.

tests/sglang/releases.json is made by buildtools/sglang_releases.py; the installed release is checked as it is imported,
by the plugin itself, in tests/sglang.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashmla_backend.integration.sglang import compat

RECORD = json.loads((Path(__file__).parents[1] / "sglang" / "releases.json").read_text())
SUPPORTED = [f"0.5.{patch}" for patch in range(compat.OLDEST[2], compat.NEWEST[2] + 1)]


def test_the_record_covers_the_supported_releases() -> None:
    assert list(RECORD) == SUPPORTED
    for release in RECORD:
        compat.check_version(release)


@pytest.mark.parametrize("release", SUPPORTED)
def test_what_we_use_is_there(release: str) -> None:
    everything = {**compat.USED, **compat.USED_BY_DCP}
    recorded = {f"{module}.{name}" for module, names in everything.items() for name in names}
    assert set(RECORD[release]["signatures"]) == recorded
    assert missing(release, compat.USED) == []


@pytest.mark.parametrize("release", SUPPORTED)
def test_what_dcp_needs_is_there_in_the_releases_that_are_named(release: str) -> None:
    has_it = tuple(map(int, release.split("."))) >= compat.OLDEST_WITH_DCP
    assert (missing(release, compat.USED_BY_DCP) == []) == has_it


def missing(release: str, used: dict[str, dict[str, tuple[str, ...]]]) -> list[str]:
    """What of `used` a release lacks, in words."""
    wrong = []
    for module, names in used.items():
        for name, parameters in names.items():
            found = RECORD[release]["signatures"][f"{module}.{name}"]
            if found is None:
                wrong.append(f"{module}.{name} is gone")
            elif not set(parameters) <= set(found):
                wrong.append(f"{module}.{name} takes {found}")
    return wrong


@pytest.mark.parametrize("release", SUPPORTED)
def test_draft_workers_import_what_we_put_in_their_module(release: str) -> None:
    # draft.py needs an engine to import, so it is read.
    source = (Path(__file__).parents[2] / "integration" / "sglang" / "draft.py").read_text()
    imported = RECORD[release]["draft_imports"]
    assert "FlashMLAMultiStepDraftBackend" in imported
    assert [name for name in imported if f'"{name}"' not in source] == []
