"""Up to how many new tokens an engine in this process decodes prompts, and what it then really decoded."""

from __future__ import annotations

from typing import Any


def set_threshold(llm: Any, tokens: int) -> None:
    """From the next step on, a vllm.LLM decodes prompts, or their uncached rest, of up to so many tokens."""
    llm.collective_rpc(_set_threshold, args=(tokens,))


def _set_threshold(worker: Any, tokens: int) -> None:
    runner = worker.model_runner
    # The builders split a batch. The runner sorts it for them, vLLM's newer one by length and without a threshold.
    holders = [group.get_metadata_builder() for groups in runner.attn_groups for group in groups]
    if hasattr(runner, "reorder_batch_threshold"):
        holders.append(runner)
    for holder in holders:
        holder.reorder_batch_threshold = tokens


class DecodedTokens:
    """Counts the tokens whose attention a vllm.LLM computes by forward_mqa; in replayed CUDA graphs none."""

    def __init__(self, llm: Any):
        self.count = 0
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        impl = next(layer.impl for layer in layers if hasattr(layer, "impl"))  # all layers decode the same
        inner = impl.forward_mqa

        def counted(q: Any, *others: Any) -> Any:
            self.count += (q[0] if isinstance(q, tuple) else q).shape[0]
            return inner(q, *others)

        impl.forward_mqa = counted
