"""Load, a pause, the canary, and again, until the time is over."""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashmla_backend.bench.backends import OURS
from flashmla_backend.bench.serve.engine import who_serves
from flashmla_backend.bench.serve.models import resolve
from flashmla_backend.bench.serve.vllm import Vllm
from flashmla_backend.bench.servers import ServerFailed, running
from flashmla_backend.bench.soak import watch
from flashmla_backend.bench.soak.traffic import TEXT_TOKENS, Client, Tally, complete, deal
from flashmla_backend.bench.vllm_server import execution, vllm_server
from flashmla_backend.schedule import TILE_TOKENS

DRAIN_SECONDS = 60
REQUEST_SECONDS = 120
CANARY_PROMPT, CANARY_TOKENS = 150, 48
MUST_HAPPEN = ("preemptions", "prefix_hits", "drafted", "accepted")


@dataclass(frozen=True)
class Plan:
    """What to run."""

    model: str
    dtype: str
    seconds: float  # of load and canaries, the start not counted
    phase: float  # seconds of load before each canary
    clients: int
    longest: int  # tokens of prompt and answer
    blocks: int  # of the cache
    drafts: int  # tokens of an n-gram draft
    growth_mib: float  # that memory may grow after the first third
    start_seconds: float
    logs: Path
    server_arguments: list[str]


@dataclass
class Results:
    """What happened."""

    tally: Tally = field(default_factory=Tally)
    canaries: list[str] = field(default_factory=list)
    memory: list[dict[str, float]] = field(default_factory=list)  # after each phase: seconds, host_mib, gpu_mib
    counters: dict[str, float] = field(default_factory=dict)
    served_by: str = ""
    seconds: float = 0.0


def run(plan: Plan, report_progress: Callable[[float, str], None], keep: Callable[[Results], None]) -> Results:
    """Soak. `report_progress(seconds so far, what)` is called now and then, `keep` after each phase with the results so
    far, which outlive a soak that is cut short. Raises ServerFailed if none starts."""
    results, log = Results(), plan.logs / "soak-server.log"
    with tempfile.TemporaryDirectory() as scratch:
        folder, model_arguments = resolve(plan.model, plan.dtype, plan.longest, Path(scratch))
        server = vllm_server(folder, OURS, [*model_arguments, *arguments(plan)], log)
        report_progress(0, "starting the server")
        with running(server, plan.start_seconds) as process:
            results.served_by = who_serves(Vllm(), OURS, log)
            try:
                asyncio.run(_soak(plan, server.url, process.pid, results, report_progress, keep))
            except Exception as error:
                if process.poll() is None:
                    raise
                raise ServerFailed(f"the server ended with code {process.returncode} ({log}): {error}") from error
    return results


def arguments(plan: Plan) -> list[str]:
    """Of vLLM's server."""
    speculation: dict[str, Any] = {"method": "ngram", "num_speculative_tokens": plan.drafts}
    speculation |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    return [
        *("--dtype", plan.dtype, "--max-model-len", str(plan.longest), "--seed", "0"),
        *("--num-gpu-blocks-override", str(plan.blocks), "--max-num-seqs", str(plan.clients)),
        *("--enable-prefix-caching", "--enable-chunked-prefill"),
        *("--max-num-batched-tokens", str(max(plan.longest // 2, plan.clients * (plan.drafts + 1)))),
        *("--speculative-config", json.dumps(speculation)),
        *execution(),
        *plan.server_arguments,
    ]


def least_blocks(longest: int) -> int:
    """Of a cache that holds one request and a spare block."""
    return -(-longest // TILE_TOKENS) + 2


def failures(plan: Plan, results: Results) -> list[str]:
    """Why the soak failed, in words; nothing if it passed."""
    found = list(results.tally.errors)
    if results.tally.failed > len(found):
        found.append(f"and {results.tally.failed - len(found)} more requests failed")
    if len(set(results.canaries)) != 1:
        found.append(f"the canary had {len(set(results.canaries))} different answers in {len(results.canaries)}")
    found += [f"no {name}: the load did not do what it is for" for name in MUST_HAPPEN if not results.counters[name]]
    found += [f"no {kind} request" for kind in ("streamed", "cancelled") if not results.tally.answered[kind]]
    for where, growth in growths(results).items():
        if growth > plan.growth_mib:
            found.append(f"{where} grew by {growth:.0f} MiB after the first third, more than {plan.growth_mib:.0f}")
    return found


def growths(results: Results) -> dict[str, float]:
    """MiB from the first sample after a third of the time to the last."""
    later = [sample for sample in results.memory if sample["seconds"] >= results.seconds / 3]
    return {where: round(later[-1][where] - later[0][where], 1) for where in ("host_mib", "gpu_mib")}


async def _soak(
    plan: Plan,
    url: str,
    group: int,
    results: Results,
    report_progress: Callable[[float, str], None],
    keep: Callable[[Results], None],
) -> None:
    from aiohttp import ClientSession, ClientTimeout, TCPConnector

    begin = time.monotonic()
    async with ClientSession(timeout=ClientTimeout(REQUEST_SECONDS), connector=TCPConnector(limit=0)) as session:

        async def metrics() -> str:
            async with session.get(f"{url}/metrics") as response:
                return await response.text()

        kinds = deal()
        clients = [Client(session, url, kinds, plan.longest, seed) for seed in range(1, plan.clients + 1)]
        results.canaries.append(await _canary(session, url, 0))
        while (now := time.monotonic() - begin) < plan.seconds:
            until = time.monotonic() + min(plan.phase, plan.seconds - now)
            report_progress(now, f"load; {results.tally.answered.total()} answered, {results.tally.failed} failed")
            await asyncio.gather(*(_ask_until(client, until, results.tally) for client in clients))
            report_progress(time.monotonic() - begin, f"canary {len(results.canaries)}")
            await _drained(metrics, results.tally)
            results.canaries.append(await _canary(session, url, len(results.canaries)))
            sample = {"host_mib": round(watch.host_mib(group), 1), "gpu_mib": round(watch.gpu_mib(), 1)}
            results.seconds = time.monotonic() - begin
            results.memory.append({"seconds": round(results.seconds, 1), **sample})
            counted = await metrics()
            results.counters = {name: watch.read(counted, metric) for name, metric in watch.COUNTERS.items()}
            keep(results)


async def _ask_until(client: Client, until: float, tally: Tally) -> None:
    while time.monotonic() < until:
        await client.ask(tally)


async def _drained(metrics: Callable[[], Awaitable[str]], tally: Tally) -> None:
    """Waits until the server has nothing to do; requests whose client left must stop by themselves."""
    deadline = time.monotonic() + DRAIN_SECONDS
    while True:
        now = await metrics()
        busy = {name: count for name in watch.BUSY if (count := watch.read(now, name))}
        if not busy:
            return
        if time.monotonic() > deadline:
            tally.fail(f"still busy {DRAIN_SECONDS} s after the last request: {busy}")
            return
        await asyncio.sleep(0.05)


async def _canary(session: Any, url: str, number: int) -> str:
    """Tokens and log probabilities of a fixed prompt, asked alone, none of its pages from the prefix cache."""
    prompt = random.Random(1).choices(TEXT_TOKENS, k=CANARY_PROMPT)
    body = {"prompt": prompt, "max_tokens": CANARY_TOKENS, "logprobs": 2, "cache_salt": f"canary {number}"}
    answer = await complete(session, url, {**body, "return_tokens_as_token_ids": True})
    found = answer["choices"][0]["logprobs"]
    return json.dumps([found["tokens"], found["token_logprobs"], found["top_logprobs"]])
