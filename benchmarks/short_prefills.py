"""Short prompts decoded or prefilled: python benchmarks/short_prefills.py --out FILE.json [--commit COMMIT]

Requests with a context in vLLM's prefix cache and some new tokens are answered with one token each: by ours with the
new tokens decoded by the MQA kernels, by ours with vLLM's prefill path, which makes keys and values of the context for
every head, and by vLLM's own backends as they choose. SHORT_PREFILL in integration/vllm/builder.py is chosen by it.
One engine start for each model and backend, in a process of its own. Exit code 1 if one failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from flashmla_backend.bench import backends, machine, tables
from flashmla_backend.bench.child import ask_child
from flashmla_backend.bench.execution import engine_arguments
from flashmla_backend.bench.provenance import provenance, write
from flashmla_backend.bench.steps.child import BLOCK_SIZE
from flashmla_backend.bench.steps.models import MODELS, write_config
from flashmla_backend.bench.steps.run import vllm_version

DECODED, PREFILLED = "ours, decoded", "ours, prefilled"
NO_SLOWER = 1.02  # time decoded / time prefilled that still counts as equal
POINT = ("context", "requests", "new")

ON_GPU = {
    "models": "v2-lite,v3-attention",
    "backends": "ours,FLASH_ATTN_MLA",
    "contexts": "0,2048,16384",
    "requests": "1,8",
    "new": "8,16,32,64,128,256,512",
    "repeats": 5,
}
ON_CPU = {
    "models": "tiny",
    "backends": "ours",
    "contexts": "0,128",
    "requests": "1,2",
    "new": "8,70",
    "repeats": 2,
}


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("short-prefills.json"))
    parser.add_argument("--commit", help="for the report, where git cannot tell")
    parser.add_argument("--models", type=lambda text: text.split(","), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--backends", type=backends.parse, help="ours, and vLLM's own by name")
    parser.add_argument("--contexts", type=numbers, help="tokens in the cache, multiples of a page")
    parser.add_argument("--requests", type=numbers, help="of a step")
    parser.add_argument("--new", type=numbers, help="tokens of each request that are not in the cache, from 2 on")
    parser.add_argument("--thresholds", type=numbers, default="1,1024", help="of ours: up to so many new are decoded")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--timeout", type=float, default=150, help="seconds of one engine, its start included")
    parser.add_argument("--logs", type=Path, default=Path("."))
    parser.set_defaults(**(ON_GPU if torch.cuda.is_available() else ON_CPU))
    arguments = parser.parse_args()
    if any(name not in MODELS for name in arguments.models):
        parser.error(f"--models accepts {', '.join(MODELS)}")
    if any(context < 0 or context % BLOCK_SIZE for context in arguments.contexts):
        parser.error(f"--contexts accepts multiples of {BLOCK_SIZE}: only whole pages are found in the cache")
    if min(arguments.new) < 2:
        parser.error("--new accepts numbers from 2 on: a single token is always decoded")
    if min(*arguments.thresholds, *arguments.requests, arguments.repeats) < 1:
        parser.error("--thresholds, --requests and --repeats accept numbers from 1 on")
    return arguments


def contenders(backend: str, new: int, thresholds: list[int]) -> dict[str, int | None]:
    """Name -> threshold: thresholds that come to the same are measured once."""
    if backend != backends.OURS:
        return {backend: None}
    return {DECODED if new <= threshold else PREFILLED: threshold for threshold in thresholds}


def ask(arguments: argparse.Namespace, model: str, backend: str) -> tuple[dict[str, Any] | None, str | None]:
    """What the child answered, if anything, and what went wrong, if anything."""
    selected, environment = backends.selection(backend)
    points = [
        {
            "context": context,
            "requests": requests,
            "new": new,
            "contenders": contenders(backend, new, arguments.thresholds),
        }
        for context in arguments.contexts
        for requests in arguments.requests
        for new in arguments.new
    ]
    with TemporaryDirectory() as folder:
        longest = max(arguments.contexts) + max(arguments.new) + 1
        request = {
            "model": str(write_config(model, "bfloat16", longest, Path(folder))),
            "attention_backend": selected,
            "dtype": "bfloat16",
            "repeats": arguments.repeats,
            "points": points,
            "engine": engine_arguments(compiled=False, batches=arguments.requests),
        }
        log = arguments.logs / f"short-prefills-{model}-{backend}.log"

        def progressed(what: str) -> None:
            print(f"{model}, {backend}: {what}", file=sys.stderr, flush=True)

        module = "flashmla_backend.bench.prefills.child"
        answer, problem = ask_child(module, request, environment, log, arguments.timeout, progressed)
    if answer is not None and (backend == backends.OURS) != answer["impl"].startswith("flashmla_backend."):
        return None, f"{answer['impl']} answered"
    return answer, problem


def merge(rows: list[dict[str, Any]], model: str, measured: list[dict[str, Any]]) -> None:
    """Adds one child's rows to those of others at the same points of that model."""
    by_point = {tuple(row[key] for key in ("model", *POINT)): row for row in rows}
    for row in measured:
        point = (model, *(row[key] for key in POINT))
        if point in by_point:
            by_point[point].update(row)
        else:
            rows.append({"model": model, **row})


def longest_decoded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each model, context and number of requests the most new tokens, 0 for none, whose decoding is not slower."""
    most: dict[tuple[str, int, int], int] = {}
    for row in rows:
        if DECODED in row and PREFILLED in row:
            case = row["model"], row["context"], row["requests"]
            fits = row[DECODED]["ms"] <= NO_SLOWER * row[PREFILLED]["ms"]
            most[case] = max(most.get(case, 0), row["new"] * fits)
    return [dict(zip(("model", "context", "requests", "new"), (*case, new), strict=True)) for case, new in most.items()]


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A head, then a line for each point: milliseconds, and the ratio of ours prefilled to ours decoded."""
    names = list(dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, dict)))
    lines = [["model", *POINT, *names, "prefilled / decoded"]]
    for row in rows:
        line = [str(row[key]) for key in ("model", *POINT)]
        for name in names:
            found = row.get(name)
            how = "" if name in (DECODED, PREFILLED) else " decoded" if found and found["decoded"] else " prefilled"
            line.append(f"{found['ms']:.2f}{how}" if found else "-")
        both = DECODED in row and PREFILLED in row
        lines.append([*line, f"{row[PREFILLED]['ms'] / row[DECODED]['ms']:.3f}" if both else "-"])
    return lines


def main() -> None:
    arguments = parse_arguments()
    arguments.logs.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    impls: dict[str, dict[str, str]] = {}
    failed: dict[str, str] = {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for model in arguments.models:
        for backend in arguments.backends:
            begin = time.monotonic()
            answer, problem = ask(arguments, model, backend)
            if answer is not None:
                merge(rows, model, answer["rows"])
                impls.setdefault(model, {})[backend] = answer["impl"]
            if problem:
                failed[f"{model}, {backend}"] = problem
            print(f"{model}, {backend}: {time.monotonic() - begin:.0f} s; {problem or 'done'}", flush=True)
            report = {
                **provenance(machine.describe(device)[0], ["python", *sys.argv], arguments.commit),
                "vllm": vllm_version(),
                "impls": impls,
                "thresholds": arguments.thresholds,
                "repeats": arguments.repeats,
                "rows": rows,
                "longest_decoded": longest_decoded(rows),
                "failed": failed,
            }
            write(report, arguments.out)
    print(tables.markdown(cells(rows)))
    for case in longest_decoded(rows):
        print(
            f"{case['model']}, context {case['context']}, requests {case['requests']}: decoding is not slower up to "
            f"{case['new']} new tokens"
        )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
