"""What of SGLang's kit needs a GPU, as a script: `python tests/sglang/kit_on_gpu.py [--out kit.json]`.

Decode with queries and rows in two parts, verification of chains and draft extension with the metadata of CUDA graphs,
and SGLang's two draft runners with real graphs, the one of drafts as draft_logits.py says; prompts and decode are
tests/sglang/test_kit.py's. The record is written after every case. Exit code 1 if a case fails or skips, or is left out
because --seconds are over.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import unittest
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from draft_logits import run_draft_runner_case
from parts import check_parts
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.plugins import load_plugins
from sglang.test.kits.attention_unittest.attention_methods.mla_attention import (
    MLAAttentionCase,
    build_mla_attention_fixture,
)
from sglang.test.kits.attention_unittest.runner_modes import (
    speculative_draft_extend_runner,
    speculative_target_verify_runner,
)

from flashmla_backend.bench import machine
from flashmla_backend.bench.provenance import provenance, write
from flashmla_backend.integration.sglang import plugin
from flashmla_backend.sglang_engine import distribution

DRAFTS = 4


class NothingMaySkip(unittest.TestCase):
    def skipTest(self, reason: str) -> NoReturn:
        raise RuntimeError(f"the kit skipped: {reason}")


def cases(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    shape: dict[str, Any] = {
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "max_context_len": 1024,
        "dtype": torch.bfloat16,
        "device": device,
    }
    verify, extend = speculative_target_verify_runner, speculative_draft_extend_runner
    for heads in (16, 128):
        for page_size in (16, 64, 128):

            def case(mode: ForwardMode, prefixes: tuple[int, ...], inputs: tuple[int, ...] = ()) -> Any:
                name = f"{mode.name}, {heads} heads, pages of {page_size}"  # noqa: B023 - called in this iteration
                return MLAAttentionCase(name, "flashmla", mode, heads, page_size, prefixes, inputs)  # noqa: B023

            # With graphs the kit writes prefixes to unshuffled pages as well, over others' if there is more than one.
            short_chains = case(ForwardMode.TARGET_VERIFY, (1, 30, 61, 63), (DRAFTS,) * 4)
            chains = case(ForwardMode.TARGET_VERIFY, (1, 61, 64, 300), (DRAFTS,) * 4)
            accepted = case(ForwardMode.DRAFT_EXTEND_V2, (61, 300), (DRAFTS,) * 2)
            steps = case(ForwardMode.DECODE, (61, 300))
            run = {
                "parts": (decode_in_parts, steps, {}),
                "verify": (verify.run_mla_eagle_verify_case, chains, {"topk": 1}),
                "verify, graph": (verify.run_mla_eagle_verify_cuda_graph_case, short_chains, {"topk": 1}),
                "draft extend, graph": (extend.run_mla_draft_extend_v2_cuda_graph_case, accepted, {}),
                "draft extend runner": (extend.run_mla_eagle_draft_extend_v2_cuda_graph_runner_case, accepted, {}),
                # Not padded: padding rows change the first draft's K of the last request, with SGLang's Triton too.
                "draft runner": (run_draft_runner_case, steps, {"cuda_graph_capture_batch_size": 2}),
            }
            for name, (function, made, more) in run.items():
                attempted = partial(function, NothingMaySkip(), made, **more, **shape)
                yield f"{name}, {heads} heads, pages of {page_size}", attempted


def decode_in_parts(test: NothingMaySkip, case: MLAAttentionCase, **shape: Any) -> None:
    check_parts(build_mla_attention_fixture(test, case, **shape))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=240, help="no case begins after so many")
    parser.add_argument("--out", type=Path, default=Path("sglang-kit.json"))
    parser.add_argument("--commit", help="for the record, where git cannot tell")
    asked = parser.parse_args()
    load_plugins()
    assert plugin.owns_flashmla(), "flashmla is not ours: see the log above"
    device = machine.describe(torch.device(asked.device))[0]
    rows: list[dict[str, Any]] = []
    record = {**provenance(device, sys.argv, asked.commit), "sglang": distribution(), "cases": rows}
    begin = time.monotonic()
    for name, run in cases(asked.device):
        started = time.monotonic()
        problem = attempt(run) if started - begin < asked.seconds else f"not run: {asked.seconds:.0f} s are over"
        seconds = round(time.monotonic() - started, 2)
        rows.append({"case": name, "ok": problem is None, "problem": problem, "seconds": seconds})
        print(f"{'ok  ' if problem is None else 'FAIL'} {name} {problem or ''}", flush=True)
        write(record, asked.out)
    failed = sum(not row["ok"] for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} cases passed in {time.monotonic() - begin:.0f} s")
    return int(failed > 0)


def attempt(run: Callable[[], None]) -> str | None:
    """Why a case failed, None if it did not."""
    try:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:
        traceback.print_exc(limit=-3)
        return " ".join(str(error).split())[:300] or repr(error)
    return None


if __name__ == "__main__":
    sys.exit(main())
