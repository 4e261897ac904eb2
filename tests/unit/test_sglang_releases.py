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
    signatures = RECORD[release]["signatures"]
    assert set(signatures) == {f"{module}.{name}" for module, names in compat.USED.items() for name in names}
    for module, names in compat.USED.items():
        for name, parameters in names.items():
            found = signatures[f"{module}.{name}"]
            assert found is not None, f"{module}.{name} is gone"
            assert set(parameters) <= set(found), f"{module}.{name} takes {found}"


@pytest.mark.parametrize("release", SUPPORTED)
def test_draft_workers_import_what_we_put_in_their_module(release: str) -> None:
    # draft.py needs an engine to import, so it is read.
    source = (Path(__file__).parents[2] / "integration" / "sglang" / "draft.py").read_text()
    imported = RECORD[release]["draft_imports"]
    assert "FlashMLAMultiStepDraftBackend" in imported
    assert [name for name in imported if f'"{name}"' not in source] == []
