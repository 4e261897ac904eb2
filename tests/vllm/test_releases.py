"""Our classes against each supported release of vLLM, as recorded from its wheels, and against the one installed."""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any

import pytest
import vllm

from flashmla_backend.doctor import ENTRY_POINTS
from flashmla_backend.integration.vllm import compat

from .releases.contract import MLA, accepts, our_needs, problems, record
from .releases.table import README, records, release_of, table

RECORDS = {release_of(made["vllm"]): made for made in records()}
NEEDS = our_needs()


def test_every_supported_release_is_recorded() -> None:
    supported = [(0, minor) for minor in range(compat.OLDEST[1], compat.NEWEST[1] + 1)]
    assert list(RECORDS) == supported


@pytest.mark.parametrize("release", RECORDS, ids=lambda release: "{}.{}".format(*release))
def test_our_classes_fit(release: tuple[int, int]) -> None:
    made = RECORDS[release]
    assert problems(made, NEEDS, on_cpu=release >= compat.OLDEST_ON_CPU) == []
    groups = [made["names"][f"vllm.plugins.{name}"] for name in ("DEFAULT_PLUGINS_GROUP", "PLATFORM_PLUGINS_GROUP")]
    assert [ast.literal_eval(group) for group in groups] == list(ENTRY_POINTS)


def test_the_installed_vllm_is_as_recorded() -> None:
    """The CPU build has the Python of the wheel that was recorded."""
    installed = record(Path(vllm.__file__).parents[1])
    assert problems(installed, NEEDS, on_cpu=True) == []
    recorded = RECORDS[release_of(vllm.__version__)]
    for part in ("imported", "names", "abstract", "calls"):
        assert installed[part] == recorded[part]


def test_the_readme_has_the_table() -> None:
    made = table(list(RECORDS.values()), NEEDS)
    assert made in README.read_text(), "python -m tests.vllm.releases table"


def _without(made: dict[str, Any]) -> None:
    made["names"][f"{MLA}.MLACommonImpl.forward_mqa"] = None


def _renamed(made: dict[str, Any]) -> None:
    made["names"][f"{MLA}.MLACommonDecodeMetadata"] = "(block_tables, seq_lens, dcp_tot_seq_lens)"


def _defaulted(made: dict[str, Any]) -> None:
    made["names"][f"{MLA}.MLACommonDecodeMetadata"] = "(block_table, seq_lens, dcp_tot_seq_lens=...)"


def _called_with_more(made: dict[str, Any]) -> None:
    made["calls"]["forward_mqa"].append("(_, _, _, _, sinks=_)")


def _overridden_with_more(made: dict[str, Any]) -> None:
    made["names"][f"{MLA}.MLACommonImpl.forward_mqa"] = "(q, kv_c_and_k_pe_cache, attn_metadata, layer, sinks=...)"


def _abstract(made: dict[str, Any]) -> None:
    made["abstract"][f"{MLA}.MLACommonImpl"].append("forward_sparse")


def _not_imported(made: dict[str, Any]) -> None:
    made["imported"] = "ImportError: no such name"


def _unrecorded(made: dict[str, Any]) -> None:
    del made["names"]["vllm.logger.init_logger"]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (_without, "MLACommonImpl.forward_mqa does not exist"),
        (_renamed, "takes no (block_table=_"),
        (_defaulted, "takes no (block_table=_"),
        (_called_with_more, "our forward_mqa(q, kv_c_and_k_pe_cache, attn_metadata, layer) takes no"),
        (_overridden_with_more, "takes not all of"),
        (_abstract, "forward_sparse is abstract and not ours"),
        (_not_imported, "our classes gave ImportError"),
        (_unrecorded, "record the releases anew"),
    ],
)
def test_a_release_that_does_not_fit_is_told(broken: Any, said: str) -> None:
    made = copy.deepcopy(RECORDS[compat.NEWEST])
    broken(made)
    assert any(said in problem for problem in problems(made, NEEDS, on_cpu=True))


@pytest.mark.parametrize(
    ("parameters", "given", "fits"),
    [
        ("(a, b=...)", "(_)", True),
        ("(a, b=...)", "(_, b=_)", True),
        ("(a, b=...)", "(_, c=_)", False),
        ("(a, *rest, **more)", "(_, _, _, c=_)", True),
        ("(a, b)", "(_)", False),
        ("(a, b)", "(_, **_)", True),
        ("()", "()", True),
    ],
)
def test_arguments_against_parameters(parameters: str, given: str, fits: bool) -> None:
    assert accepts(parameters, given) == fits
