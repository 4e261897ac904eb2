"""Host time of attention in a decode step, ours beside vLLM's FLASHMLA: `python -m flashmla_backend.bench.steps.host`.

Microseconds that Python and the launches take, per step (`build`: the metadata, and what the first layer does more than
the others) and per layer (`forward_mqa`). It competes with the GPU only where no CUDA graph is replayed. Needs a Hopper
GPU with vLLM; the GPU's work is kept so small that the host never waits for it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from flashmla_backend.bench import machine
from flashmla_backend.bench.provenance import provenance, write
from flashmla_backend.bench.steps.run import vllm_version

LAYERS, STEPS, WARMUP = 48, 200, 20
HEADS, PAGE, LENGTH = 16, 64, 64
SCALE = 192**-0.5

Build = Callable[..., Any]
Forward = Callable[..., Any]


def ours(device: torch.device) -> tuple[Build, Forward]:
    from flashmla_backend.integration.planner import StepPlanner
    from flashmla_backend.integration.vllm.builder import FlashMLAMetadataBuilder
    from flashmla_backend.integration.vllm.impl import FlashMLAImpl

    builder = object.__new__(FlashMLAMetadataBuilder)
    builder.planner = StepPlanner(device, h_q=HEADS, page_size=PAGE, longest_query=1)
    builder.longest_uniform = 1
    impl = object.__new__(FlashMLAImpl)
    impl.scale = SCALE
    return builder._build_decode, impl.forward_mqa


def builtin(device: torch.device) -> tuple[Build, Forward]:
    from vllm.v1.attention.backends.mla.flashmla import FlashMLAImpl, FlashMLAMetadataBuilder

    builder = object.__new__(FlashMLAMetadataBuilder)
    builder.num_q_heads, builder.dcp_world_size, builder.is_fp8_kvcache = HEADS, 1, False
    impl = object.__new__(FlashMLAImpl)
    impl.scale, impl.kv_cache_dtype, impl.kv_lora_rank = SCALE, "auto", 512
    return builder._build_decode, impl.forward_mqa


def measure(
    contenders: dict[str, tuple[Build, Forward]], batch: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Medians over steps, in microseconds. Contenders take turns, so that a slow moment of the host meets all."""
    cache = torch.zeros(batch + 1, PAGE, 576, dtype=torch.bfloat16, device=device)
    q = (
        torch.zeros(HEADS, batch, 512, dtype=torch.bfloat16, device=device).transpose(0, 1),
        torch.zeros(batch, HEADS, 64, dtype=torch.bfloat16, device=device),
    )
    offsets = torch.arange(batch + 1, dtype=torch.int32)
    arguments = {
        "block_table_tensor": torch.arange(batch, dtype=torch.int32, device=device)[:, None].repeat(1, 8),
        "seq_lens_device": torch.full((batch,), LENGTH, dtype=torch.int32, device=device),
        "max_seq_len": LENGTH,
        "query_start_loc_cpu": offsets,
        "query_start_loc_device": offsets.to(device),
        "num_decode_tokens": batch,
        "dcp_tot_seq_lens_device": None,
    }
    steps: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contenders}
    for _ in range(WARMUP + STEPS):
        for name, (build, forward) in contenders.items():
            torch.cuda.synchronize(device)
            marks = [time.perf_counter()]
            metadata = SimpleNamespace(num_decodes=batch, decode=build(**arguments))
            marks.append(time.perf_counter())
            forward(q, cache, metadata, None)
            marks.append(time.perf_counter())
            for _ in range(LAYERS - 1):
                forward(q, cache, metadata, None)
            marks.append(time.perf_counter())
            build_us, first_us, rest_us = ((after - before) * 1e6 for before, after in pairwise(marks))
            steps[name].append((build_us, first_us, rest_us / (LAYERS - 1)))
    return {name: medians(spent[WARMUP:]) for name, spent in steps.items()}


def medians(steps: list[tuple[float, float, float]]) -> dict[str, float]:
    """Of the host's time before the layers, in the first one and in each other one."""
    build_us, first_us, layer_us = (statistics.median(times) for times in zip(*steps, strict=True))
    return {
        "build": round(build_us + first_us - layer_us, 2),
        "of which in the first layer": round(first_us - layer_us, 2),
        "forward_mqa": round(layer_us, 2),
        "step of 48 layers": round(build_us + first_us + layer_us * (LAYERS - 1), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("vllm-host.json"))
    parser.add_argument("--commit", help="for the report, where git cannot tell")
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    contenders = {"ours": ours(device), "FLASHMLA": builtin(device)}
    found = {f"batch {batch}": measure(contenders, batch, device) for batch in (1, 8, 64)}
    command = ["python", "-m", "flashmla_backend.bench.steps.host", *sys.argv[1:]]
    write(
        {
            **provenance(machine.describe(device)[0], command, arguments.commit),
            "vllm": vllm_version(),
            "layers": LAYERS,
            "host_us": found,
        },
        arguments.out,
    )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
