"""vLLM's answers alone and in company: python benchmarks/vllm_invariance.py --out FILE.json [--commit COMMIT]

Needles, prompts of different lengths, are answered alone, and then all of them at random positions among random others
in batches of 64 that shrink as the others end. Their tokens and log probabilities are compared bit for bit.
VLLM_BATCH_INVARIANT=1 makes vLLM's own layers invariant too; where it is missing, answers are expected to differ.
One engine start a line, each in a process of its own. Exit code 1 if one failed or was served by another backend, or
if ours differs with the switch.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
import vllm_common as common

from flashmla_backend.bench import machine
from flashmla_backend.bench.backends import OURS
from flashmla_backend.bench.provenance import provenance, write
from flashmla_backend.bench.steps.run import vllm_version
from flashmla_backend.checkpoint import Architecture, make_checkpoint
from flashmla_backend.integration.claim import BATCH_INVARIANT_VARIABLE

NEEDLES = (1, 3, 63, 64, 65, 200, 449, 511, 513, 1025)  # tokens
BATCH = 64
LONGEST = 1200  # of the others
NEW_TOKENS = 32  # of a needle; others end earlier
FREE = {"VLLM_BATCH_INVARIANT": "0", BATCH_INVARIANT_VARIABLE: "0"}
VLLM_SWITCH = {**FREE, "VLLM_BATCH_INVARIANT": "1"}
OUR_SWITCH = {**FREE, BATCH_INVARIANT_VARIABLE: "1"}

# In vLLM 0.26 to 0.33 these two of its MLA backends on Hopper accept the switch.
RUNS: dict[str, tuple[str, dict[str, str]]] = {
    "ours": (OURS, VLLM_SWITCH),
    "ours, attention alone": (OURS, OUR_SWITCH),
    "ours, free": (OURS, FREE),
    "FLASH_ATTN_MLA": ("FLASH_ATTN_MLA", VLLM_SWITCH),
    "TRITON_MLA": ("TRITON_MLA", VLLM_SWITCH),
}


def draw_prompt(length: int, source: random.Random, vocabulary: int) -> list[int]:
    return [source.randrange(5, vocabulary) for _ in range(length)]


def arrangements(
    needles: list[list[int]], how_many: int, source: random.Random, vocabulary: int
) -> Iterator[tuple[list[common.Asked], list[int]]]:
    """Batches with all needles in them, and where in the batch each needle is."""
    for _ in range(how_many):
        positions = source.sample(range(BATCH), len(needles))
        batch = [
            (draw_prompt(source.randint(1, LONGEST), source, vocabulary), source.randint(1, NEW_TOKENS))
            for _ in range(BATCH)
        ]
        for needle, position in zip(needles, positions, strict=True):
            batch[position] = (needle, NEW_TOKENS)
        yield batch, positions


def engine_arguments(model: str) -> dict[str, Any]:
    """Prompts in one piece: where a long one would be cut, and with it rounding, depends on who else is there."""
    longest = LONGEST + NEW_TOKENS + 1
    return {
        "model": model,
        "dtype": "bfloat16",
        "max_model_len": longest,
        "max_num_seqs": BATCH,
        "max_num_batched_tokens": 4 * longest,
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 30,
        "skip_tokenizer_init": True,
        "seed": 0,
        **({"compilation_config": common.GRAPHS} if torch.cuda.is_available() else {"enforce_eager": True}),
    }


def compare(answers: list[list[common.Answer]], places: list[list[int]]) -> dict[str, Any]:
    """Of `answers` the first batches are the needles alone, the others the arrangements."""
    alone = [answer for (answer,) in answers[: len(NEEDLES)]]
    cases = differing_tokens = differing = 0
    lengths = set()
    for batch, positions in zip(answers[len(NEEDLES) :], places, strict=True):
        for length, expected, position in zip(NEEDLES, alone, positions, strict=True):
            found = batch[position]
            cases += 1
            differing_tokens += found["tokens"] != expected["tokens"]
            if found != expected:
                differing += 1
                lengths.add(length)
    return {
        "cases": cases,
        "differing": differing,
        "of_these_in_tokens": differing_tokens,
        "differing_lengths": sorted(lengths),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("vllm-invariance.json"))
    parser.add_argument("--commit", help="for the report, where git cannot tell")
    parser.add_argument("--runs", default=";".join(RUNS), help="separated by semicolons")
    parser.add_argument("--architecture", choices=get_args(Architecture), default="v3-moe")
    parser.add_argument("--arrangements", type=int, default=8, help="batches that the needles are put into")
    arguments = parser.parse_args()
    source = random.Random(5)
    rows: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    with TemporaryDirectory() as folder:
        model = str(make_checkpoint(Path(folder) / "model", arguments.architecture))
        vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
        needles = [draw_prompt(length, source, vocabulary) for length in NEEDLES]
        arranged = list(arrangements(needles, arguments.arrangements, source, vocabulary))
        batches = [[(needle, NEW_TOKENS)] for needle in needles] + [batch for batch, _ in arranged]
        places = [positions for _, positions in arranged]
        for name in arguments.runs.split(";"):
            backend, environment = RUNS[name]
            begin = time.monotonic()
            try:
                engine = engine_arguments(model)
                ran = common.answers_of(name, backend, engine, batches, Path(folder), environment)
                rows[name] = {**compare(ran.batches, places), "environment": environment, "served_by": ran.served_by}
                print(f"{name}: {time.monotonic() - begin:.0f} s; {ran.served_by}", flush=True)
            except (subprocess.SubprocessError, RuntimeError, OSError) as error:
                failed[name] = str(error)
                print(f"{name}: failed after {time.monotonic() - begin:.0f} s: {error}", flush=True)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            report = {
                **provenance(machine.describe(device)[0], ["python", *sys.argv], arguments.commit),
                "vllm": vllm_version(),
                "architecture": arguments.architecture,
                "batch": BATCH,
                "rows": rows,
                "failed": failed,
            }
            write(report, arguments.out)
    for name, row in rows.items():
        print(
            f"{name}: {row['differing']} of {row['cases']} differ from the same alone, "
            f"{row['of_these_in_tokens']} of them in tokens; lengths {row['differing_lengths']}"
        )
    sys.exit(bool(failed) or any(rows[name]["differing"] for name in rows if name == "ours"))


if __name__ == "__main__":
    main()
