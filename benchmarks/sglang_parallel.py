"""SGLang on two GPUs: python benchmarks/sglang_parallel.py --out FILE.json [--commit COMMIT]

Tensor parallelism (TP 2) and decode context parallelism (DCP 2, each GPU caches half of the tokens) on our backend,
against the first run, SGLang's Triton backend on one GPU: log probabilities of greedy answers, up to where they part.
Prompts of mixed lengths come in chunks, and then others that begin with the longest of them, from the prefix cache.
One engine start a run, each in a process of its own with a time limit; the report is written after every one. Exit code
1 if a run failed, was served by another backend, or its logprobs differ by more than --bound in the mean.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sglang_common as common
import torch

from flashmla_backend.bench import machine
from flashmla_backend.bench.provenance import provenance, write
from flashmla_backend.sglang_engine import IDLE_YARN, distribution

common.prepare()

LENGTHS = (1, 2, 17, 63, 64, 65, 127, 128, 129, 200, 350, 511, 640, 900, 1000, 1500)
TAILS = (1, 50, 64, 130)  # of the prompts that begin with the longest
CHUNK = 512
NEW_TOKENS = 32
HEADS = 32
DCP = {"tp_size": 2, "dcp_size": 2}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "triton": ("triton", {}),
    "ours": ("ours", {}),
    "ours, TP 2": ("ours", {"tp_size": 2}),
    "ours, TP 2, DCP 2": ("ours", DCP),
    "ours, TP 2, DCP 2, eager": ("ours", {**DCP, "disable_decode_cuda_graph": True}),
    "ours, TP 2, DCP 2, a2a": ("ours", {**DCP, "dcp_comm_backend": "a2a"}),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default=";".join([*RUNS][:4]), help=f"separated by semicolons, of: {'; '.join(RUNS)}")
    parser.add_argument("--layers", type=int, default=8)
    common.add_options(parser, "sglang-parallel", limit_s=100, bound=0.1)
    common.add_child_options(parser)
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    if asked.run:
        answer(asked)
        return 0
    names = asked.runs.split(";")
    unknown = [name for name in names if name not in RUNS]
    if unknown:
        print(f"--runs has {'; '.join(unknown)}; accepted: {'; '.join(RUNS)}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {
        **provenance(machine.describe(torch.device(asked.device))[0], sys.argv, asked.commit),
        "devices": torch.cuda.device_count(),
        "sglang": distribution(),
        "layers": asked.layers,
        "heads": HEADS,
        "runs": {},
        "compared": {},
        "notes": [],
    }
    answers: dict[str, list[common.Answer]] = {}
    with TemporaryDirectory() as scratch:
        model = common.make_dense_model(Path(scratch) / "model", asked.layers, HEADS)
        for number, name in enumerate(names):
            file = Path(scratch) / f"{number}.json"
            command = [*sys.argv, "--runs", name, "--run", str(file), "--model", str(model)]
            found, problem = common.run_child(name, RUNS[name][0], command, file, asked.logs, asked.limit)
            if problem:
                report["notes"].append(f"{name}: {problem}")
            else:
                answers[name] = found["answers"]
                report["runs"][name] = {"cached_tokens": found["cached"]}
                if len(answers) > 1:
                    report["compared"][name] = common.compare(next(iter(answers.values())), answers[name])
            write(report, asked.out)
    report["notes"] += common.far_off(report["compared"], asked.bound)
    write(report, asked.out)
    for note in report["notes"]:
        print(note)
    for name, seen in report["compared"].items():
        print(f"{name} against {next(iter(answers))}: {common.words(seen)}")
    return 1 if report["notes"] else 0


def answer(asked: argparse.Namespace) -> None:
    """Greedy answers of one run into the file `asked.run`, and how many tokens of each prompt it found in its cache."""
    from sglang.srt.entrypoints.engine import Engine

    backend, parallel = RUNS[asked.runs]
    longest = max(LENGTHS) + max(TAILS) + NEW_TOKENS
    on_cpu = {"json_model_override_args": json.dumps(IDLE_YARN)} if asked.device == "cpu" else {}
    engine = Engine(
        model_path=asked.model,
        device=asked.device,
        dtype="bfloat16",
        **common.selection(backend)[0],
        page_size=64,
        context_length=longest + 1,
        max_total_tokens=16384,  # of each rank
        max_running_requests=len(LENGTHS),
        chunked_prefill_size=CHUNK,
        mem_fraction_static=0.6,
        skip_tokenizer_init=True,
        grammar_backend="none",
        sampling_backend="pytorch",
        random_seed=0,
        log_level="info",
        mm_feature_transport="cpu",
        disable_custom_all_reduce=True,
        disable_prefill_cuda_graph=True,
        cuda_graph_bs_decode=[1, 4, len(LENGTHS)],
        **{**on_cpu, **parallel},
    )
    prompts = [common.prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    sharing = [prompts[-1] + common.prompt(length, 100 + seed) for seed, length in enumerate(TAILS)]
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    outputs = [
        output
        for batch in (prompts, sharing)
        for output in engine.generate(input_ids=batch, sampling_params=sampling, return_logprob=True)
    ]
    cached = [output["meta_info"]["cached_tokens"] for output in outputs]
    Path(asked.run).write_text(json.dumps({"answers": [common.answer_of(o) for o in outputs], "cached": cached}))
    engine.shutdown()


if __name__ == "__main__":
    sys.exit(main())
