"""SGLang's attention backend: decode, verification and draft extension are ours, prompts are SGLang's."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from flashmla_backend import DecodePlan, mla_decode
from flashmla_backend.dispatch import NAMES, path_of
from flashmla_backend.paging import D_QK, D_V
from flashmla_backend.selfcheck import check_decode

from ..planner import StepPlanner
from . import LOGGER_NAME, compat
from .prefill import PrefillBackend
from .refusals import check_runner
from .steps import StepBuffers, run_tokens

logger = logging.getLogger(LOGGER_NAME)


class FlashMLABackend(PrefillBackend):
    """SGLang's `flashmla`, served by flashmla_backend.

    Args:
        model_runner: SGLang's, with its pools allocated.
        skip_prefill: no prompts come here (draft workers).
        added: tokens that the cache holds beyond `seq_lens` when a decode step attends: i + 1 at draft step i.

    Raises:
        Unsupported: the model, its cache or the way it is served is none that our decode has; the message names the
            flag that helps.
    """

    def __init__(self, model_runner: Any, skip_prefill: bool = False, *, added: int = 0) -> None:
        check_runner(model_runner)
        super().__init__(model_runner, skip_prefill)
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.max_context_len = model_runner.model_config.context_len
        self.share = compat.dcp_share()
        self.h_q = compat.query_heads(model_runner) * self.share.ranks
        self.added = added
        longest = 1 if added else compat.draft_tokens(model_runner)
        self.planner = StepPlanner(
            self.req_to_token.device,
            h_q=self.h_q,
            page_size=run_tokens(model_runner.page_size),
            longest_query=longest,
            logger=logger,
        )
        pool = model_runner.token_to_kv_pool
        self.num_pages = pool.get_key_buffer(pool.start_layer).shape[0] // self.planner.page_size
        self._eager: StepBuffers | None = None
        self._captured: StepBuffers | None = None
        if compat.scales_queries(model_runner):
            compat.take_queries_whole()
        check_decode(self.req_to_token.device, model_runner.dtype, self.h_q)
        logger.info(
            "flashmla_backend %s serves MLA decode: %s, %d-token pages",
            version("flashmla_backend"),
            NAMES[path_of(self.req_to_token.device)],
            self.planner.page_size,
        )

    def init_forward_metadata(self, forward_batch: Any) -> None:
        if is_prompt(forward_batch.forward_mode):
            super().init_forward_metadata(forward_batch)
        elif forward_batch.batch_size:
            if self._eager is None or self._eager.rows < forward_batch.batch_size:
                power_of_two = 1 << (forward_batch.batch_size - 1).bit_length()  # so that they rarely grow
                self._eager = self._buffers(power_of_two)
            self.forward_metadata = self._plan(self._eager, forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        # Graphs keep the addresses they were captured with: these buffers are never replaced by larger ones.
        if self._captured is None:
            self._captured = self._buffers(max_bs)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        if is_prompt(forward_batch.forward_mode):
            super().init_forward_metadata_out_graph(forward_batch, in_capture)
        elif in_capture:
            self._graph_buffers(forward_batch).reserve(forward_batch.batch_size, query_tokens(forward_batch))
        else:
            self.planner.log_faults()

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        if is_prompt(forward_batch.forward_mode):
            super().init_forward_metadata_in_graph(forward_batch)
        else:
            self.forward_metadata = self._plan(self._graph_buffers(forward_batch), forward_batch)

    def draft_extend_metadata_captured_in_graph(self) -> bool:
        return True

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def get_verify_buffers_to_fill_after_draft(self) -> list[None]:
        """A chain of drafts needs no mask."""
        return [None, None]

    @property
    def verify_mask(self) -> None:
        return None

    def forward_decode(
        self,
        q: torch.Tensor,
        k: Any,
        v: Any,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        *,
        q_rope: torch.Tensor | None = None,
        k_rope: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of the new tokens over the latent cache.

        q: [T, H_q, 512], and q_rope [T, H_q, 64]; or q alone, [T, H_q * 576].
        k: [T, 1, 512], and k_rope [T, 1, 64], or k alone, [T, 1, 576], to be written first; None if it is in the cache.
        Returns [T, H_q * 512] in q's dtype; under DCP with the LSE [T, H_q], fp32 and natural, -inf without tokens.
        """
        if save_kv_cache and k is not None:
            self._write(layer, forward_batch.out_cache_loc, k, v, k_rope)
        plan: DecodePlan = self.forward_metadata
        cache = self.token_to_kv_pool.get_key_buffer(layer.layer_id)  # [slots, 1, 576]
        planned = plan.batch * plan.s_q

        def of_requests(columns: torch.Tensor, width: int) -> torch.Tensor:
            rows = columns.detach().view(-1, plan.h_q, width)[:planned]
            return rows.unflatten(0, (plan.batch, plan.s_q))

        out, lse = mla_decode(
            of_requests(q, D_QK) if q_rope is None else (of_requests(q, D_V), of_requests(q_rope, D_QK - D_V)),
            cache[: self.num_pages * plan.page_size].view(self.num_pages, plan.page_size, 1, D_QK),
            plan,
            softmax_scale=layer.scaling,
        )
        out = padded(out.view(planned, plan.h_q * D_V), q.shape[0])
        return out if self.share.ranks == 1 else (out, padded(lse.view(planned, plan.h_q), q.shape[0]))

    def forward_extend(
        self,
        q: torch.Tensor,
        k: Any,
        v: Any,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        *,
        q_rope: torch.Tensor | None = None,
        k_rope: torch.Tensor | None = None,
        **of_prompts: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if not is_prompt(forward_batch.forward_mode):
            return self.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, q_rope=q_rope, k_rope=k_rope)
        if save_kv_cache and self.share.ranks > 1:  # SGLang's backends would take slots for rows
            self._write(layer, forward_batch.out_cache_loc, k, v, k_rope)
            save_kv_cache = False
        if q_rope is not None and k_rope is not None:  # SGLang's backend takes them whole
            q, k = torch.cat([q, q_rope], dim=-1), torch.cat([k, k_rope], dim=-1)
        out: torch.Tensor = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **of_prompts)
        return out

    def _write(self, layer: Any, slots: torch.Tensor, k: torch.Tensor, v: Any, k_rope: torch.Tensor | None) -> None:
        """New rows into the cache. SGLang has a kernel that takes their two parts and knows DCP, on GPUs only."""
        if k_rope is not None and k.device.type == "cuda":
            self.token_to_kv_pool.set_mla_kv_buffer(layer, slots, k, k_rope)
            return
        rows = k if k_rope is None else torch.cat([k, k_rope], dim=-1)
        if self.share.ranks > 1:
            self.share.write(self.token_to_kv_pool.get_key_buffer(layer.layer_id), slots, rows)
        else:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(slots), rows, v)

    def _buffers(self, rows: int) -> StepBuffers:
        return StepBuffers(self.req_to_token, rows, self.planner, self.num_pages, self.share)

    def _plan(self, buffers: StepBuffers, forward_batch: Any) -> DecodePlan:
        batch, s_q = forward_batch.batch_size, query_tokens(forward_batch)
        # A batch to verify does not count its drafts yet; one that extends the draft's cache does.
        added = s_q if forward_batch.forward_mode.is_target_verify() else self.added
        return buffers.plan(forward_batch.req_pool_indices[:batch], forward_batch.seq_lens[:batch], added, s_q)

    def _graph_buffers(self, forward_batch: Any) -> StepBuffers:
        assert self._captured is not None and forward_batch.batch_size <= self._captured.rows
        return self._captured


def padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Zeros in rows that other ranks made SGLang add after the step was planned: nobody reads them."""
    missing = count - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows


def is_prompt(mode: Any) -> bool:
    """Whether a forward mode is SGLang's to serve: prompts, alone or mixed with decoding requests."""
    return not (mode.is_decode_or_idle() or mode.is_target_verify() or mode.is_draft_extend_v2())


def query_tokens(forward_batch: Any) -> int:
    """Query tokens per request, the same for all: 1, or the length of the chain of drafts."""
    if forward_batch.forward_mode.is_decode_or_idle():
        return 1
    tokens: int = forward_batch.input_ids.shape[0]
    return tokens // forward_batch.batch_size
