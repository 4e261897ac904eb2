"""One start of the real engine, in a process of its own: `python engine_run.py request.json answer.json`.

request: {"engine": keyword arguments of vllm.LLM, "batches": [[prompt token ids, ...], ...], "new_tokens": int}
answer: {"tokens": [[ids, ...], ...], "cached": [[int, ...], ...], "counters": {name: value},
         "config": {name: value}, "backend": class of the layers' attention, "decodes": {"B,S_q": calls of it}},
        S_q 0 of ragged steps; "decoding_layers": layers that called

Batches run one after the other, so a later one can find an earlier one's pages. What vLLM logs goes to stdout.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def watch_decodes(worker: Any) -> str:
    """In the worker: counts the attention layers' calls of forward_mqa by batch and query length."""
    layers = worker.model_runner.compilation_config.static_forward_context.values()
    (impl,) = {type(layer.impl) for layer in layers if hasattr(layer, "impl")}
    inner, worker.decodes, worker.decoding_layers = impl.forward_mqa, Counter(), set()

    def counted(self: Any, q: Any, cache: Any, metadata: Any, layer: Any) -> Any:
        answer = inner(self, q, cache, metadata, layer)
        plan = getattr(metadata.decode, "planned", None)  # none of vLLM's own backends, which decode single tokens
        ragged = plan is not None and plan.query_offsets is not None
        tokens = (q[0] if isinstance(q, tuple) else q).shape[0]
        worker.decodes[f"{metadata.num_decodes},{0 if ragged else tokens // metadata.num_decodes}"] += 1
        worker.decoding_layers.add(id(layer))
        return answer

    impl.forward_mqa = counted
    return f"{impl.__module__}.{impl.__qualname__}"


def decodes_so_far(worker: Any) -> dict[str, int]:
    return dict(worker.decodes)


def decoding_layers(worker: Any) -> int:
    return len(worker.decoding_layers)


def main(request_path: str, answer_path: str) -> None:
    from vllm import LLM, SamplingParams

    request = json.loads(Path(request_path).read_text())
    llm = LLM(**request["engine"], seed=0, disable_log_stats=False)
    (backend,) = set(llm.collective_rpc(watch_decodes))
    sampling = SamplingParams(temperature=0, max_tokens=request["new_tokens"], ignore_eos=True, detokenize=False)
    answer: dict[str, Any] = {"tokens": [], "cached": [], "backend": backend}
    for batch in request["batches"]:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in batch], sampling, use_tqdm=False)
        answer["tokens"].append([list(output.outputs[0].token_ids) for output in outputs])
        answer["cached"].append([output.num_cached_tokens or 0 for output in outputs])
    config = llm.llm_engine.vllm_config
    answer["config"] = {
        "block_size": config.cache_config.block_size,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
        "batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "compilation": config.compilation_config.mode.name,
    }
    answer["counters"] = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    (answer["decodes"],) = llm.collective_rpc(decodes_so_far)
    (answer["decoding_layers"],) = llm.collective_rpc(decoding_layers)
    Path(answer_path).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
