"""Which implementation serves which device; the GPUs are made up."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import ClassVar

import pytest
import torch

import flashmla_backend
import flashmla_backend.flash_mla
from flashmla_backend import InvalidArgument, Unsupported, dispatch, flashinfer_path, native, reference
from flashmla_backend.schedule import MAX_ROUNDS, max_splits
from tests.conftest import check_close, make_problem

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that cuda:0 has a compute capability, our kernels load or not, FlashInfer is there or not."""

    def pretend(capability: tuple[int, int], *, kernels: bool = True, flashinfer: bool = False) -> None:
        monkeypatch.setattr(dispatch, "_chosen", {})
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Made-up GPU")
        monkeypatch.setattr(native, "unavailable_reason", lambda: None if kernels else "the module is not built")
        find = importlib.util.find_spec
        found = importlib.machinery.ModuleSpec("flashinfer", None) if flashinfer else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "flashinfer" else find(name))

    return pretend


def test_cpu() -> None:
    assert dispatch.path_of(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize("flashinfer", [True, False])
def test_hopper_gets_our_kernels(gpu: Callable[..., None], flashinfer: bool) -> None:
    gpu((9, 0), flashinfer=flashinfer)
    assert dispatch.path_of(GPU) == "sm90"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (10, 0)])
def test_other_gpus_get_flashinfer(gpu: Callable[..., None], capability: tuple[int, int]) -> None:
    gpu(capability, flashinfer=True)
    assert dispatch.path_of(GPU) == "flashinfer"


def test_hopper_without_our_kernels_gets_flashinfer(gpu: Callable[..., None]) -> None:
    gpu((9, 0), kernels=False, flashinfer=True)
    assert dispatch.path_of(GPU) == "flashinfer"


@pytest.mark.parametrize(
    "capability, kernels, reason",
    [((8, 0), True, r"ours run on 9.0 \(Hopper\) only"), ((9, 0), False, "the module is not built")],
)
def test_nothing_for_a_gpu_is_told_with_the_way_out(
    gpu: Callable[..., None], capability: tuple[int, int], kernels: bool, reason: str
) -> None:
    gpu(capability, kernels=kernels)
    with pytest.raises(Unsupported) as error:
        dispatch.path_of(GPU)
    dotted = ".".join(map(str, capability))
    for part in (r"cuda:0 \(Made-up GPU, compute capability " + dotted, reason, "pip install flashinfer-python"):
        error.match(part)


def test_max_splits_bounds_every_schedule() -> None:
    assert max_splits(132) == MAX_ROUNDS * 132


class Wrapper:
    """Stands in for FlashInfer's, with its signatures (0.6.14; 0.7.2 adds keywords): decodes by the oracle what it was
    told in `plan`, log-sum-exp in base 2."""

    made: ClassVar[list[Wrapper]] = []

    def __init__(self, float_workspace_buffer: torch.Tensor, use_cuda_graph: bool = False, backend: str = "auto"):
        assert backend == "fa2" and not use_cuda_graph
        self.made.append(self)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        use_profiler: bool = False,
    ) -> None:
        assert (head_dim_ckv, head_dim_kpe, q_data_type) == (512, 64, kv_data_type)
        assert all(t.dtype == torch.int32 for t in (qo_indptr, kv_indptr, kv_indices, kv_len_arr))
        self.heads, self.causal, self.scale, self.dtype = num_heads, causal, sm_scale, q_data_type
        self.query_offsets, self.page_size, self.seq_lens = qo_indptr, page_size, kv_len_arr
        table = torch.zeros(len(kv_len_arr), int(kv_indptr.diff().max()), dtype=torch.int32)
        for r in range(len(kv_len_arr)):
            own = kv_indices[kv_indptr[r] : kv_indptr[r + 1]]
            table[r, : len(own)] = own
        self.table = table
        self.refuse_tiles_that_end_amid_a_query()

    def refuse_tiles_that_end_amid_a_query(self) -> None:
        """0.7.2 does where a token would be lost; here always, if there is a mask."""
        rows = int(self.query_offsets[1]) * self.heads
        assert not self.causal or rows <= 64 or 128 % self.heads == 0

    def run(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        ckv_cache: torch.Tensor,
        kpe_cache: torch.Tensor,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert (q_nope.shape[1], q_nope.dtype, ckv_cache.shape[1]) == (self.heads, self.dtype, self.page_size)
        assert return_lse and len(q_nope) == self.query_offsets[-1]
        q = torch.cat([q_nope, q_pe], -1).unflatten(0, (len(self.seq_lens), -1))
        cache = torch.cat([ckv_cache, kpe_cache], -1)[:, :, None]
        made = reference.mla_decode(q, cache, self.table, self.seq_lens, softmax_scale=self.scale, causal=self.causal)
        # Rows that see nothing are not FlashInfer's to define.
        made[0][made[1] == float("-inf")] = float("nan")
        return made[0].to(q.dtype).flatten(0, 1), (made[1] / 0.6931471805599453).float().flatten(0, 1)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlashInfer serves the CPU."""
    module = ModuleType("flashinfer.mla")
    module.BatchMLAPagedAttentionWrapper = Wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.mla", module)
    monkeypatch.setattr(dispatch, "_chosen", {torch.device("cpu"): "flashinfer"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(flashinfer_path, "_workspaces", {torch.device("cpu"): torch.empty(0)})
    monkeypatch.setattr(Wrapper, "made", [])
    yield


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("page_size, s_q, h_q", [(16, 2, 8), (64, 2, 8), (64, 4, 40), (64, 1, 20)])
def test_flashinfer_is_given_the_step_and_gives_our_results(
    stand_in: None, causal: bool, page_size: int, s_q: int, h_q: int
) -> None:
    problem = make_problem([100, 0, 1, 64, 700], s_q=s_q, h_q=h_q, page_size=page_size)
    plan = flashmla_backend.plan_decode(
        problem.seq_lens, problem.block_table, s_q=s_q, h_q=h_q, page_size=page_size, causal=causal
    )
    for _ in range(2):
        out, lse = flashmla_backend.mla_decode(problem.q, problem.kv_cache, plan, softmax_scale=0.05)
    assert len(Wrapper.made) == 1, "the layers of a step share one plan"
    expected = reference.mla_decode(
        problem.q, problem.kv_cache, problem.block_table, problem.seq_lens, softmax_scale=0.05, causal=causal
    )
    check_close(out, lse, *expected)
    assert "planned by FlashInfer" in str(plan)


def test_flashinfer_has_these_signatures() -> None:
    real = pytest.importorskip("flashinfer.mla").BatchMLAPagedAttentionWrapper
    for method in ("__init__", "plan", "run"):
        ours, theirs = (inspect.signature(getattr(wrapper, method)).parameters for wrapper in (Wrapper, real))
        assert set(ours) <= set(theirs), method


def test_what_flashinfer_cannot_do_is_refused_by_name(stand_in: None) -> None:
    problem = make_problem([100], h_q=6, h_kv=2)
    with pytest.raises(Unsupported, match="h_kv is 2; accepted by FlashInfer"):
        flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, s_q=1, h_q=6, h_kv=2)
    plan = flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, s_q=1, h_q=6)
    with pytest.raises(Unsupported, match="reuse was given: FlashInfer serves cpu"):
        flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, s_q=1, h_q=6, reuse=plan)
    with pytest.raises(InvalidArgument, match="float32; accepted: bfloat16, float16"):
        flashmla_backend.mla_decode(problem.q.float(), problem.kv_cache[:, :, :1].float(), plan, softmax_scale=0.1)
    with pytest.raises(Unsupported, match=r"call get_mla_metadata\(\) without arguments"):
        flashmla_backend.flash_mla.get_mla_metadata(problem.seq_lens, 6, 1)
