"""What SGLang's draft workers import: one backend per draft step, for chains of drafts (EAGLE and MTP, topk 1)."""

from __future__ import annotations

from typing import Any

from .backend import FlashMLABackend
from .refusals import check_topk

__all__ = ["FlashMLABackend", "FlashMLAMultiStepDraftBackend"]


class FlashMLAMultiStepDraftBackend:
    """The decode steps of a draft model, all planned before the first.

    Step i attends to the committed tokens and to those of drafts 0 .. i.
    """

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any, topk: int, speculative_num_steps: int) -> None:
        check_topk(topk)
        self.topk = topk
        self.speculative_num_steps = speculative_num_steps
        self.attn_backends = [
            FlashMLABackend(model_runner, skip_prefill=True, added=step + 1)
            for step in range(speculative_num_steps - 1)
        ]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        for backend in self.attn_backends:
            backend.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata_out_graph(forward_batch, in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata_in_graph(forward_batch)
