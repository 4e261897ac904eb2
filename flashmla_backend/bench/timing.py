"""How long a call takes: medians of CUDA-graph replays on a GPU, of plain loops on the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

MIN_REPLAYS, MAX_REPLAYS = 3, 60


class Timing(NamedTuple):
    """Microseconds of one call."""

    median_us: float
    least_us: float


def time_calls(calls: Sequence[Callable[[], Any]], device: torch.device, target_ms: float = 40) -> Timing:
    """Run all calls back to back, again and again for about `target_ms`; the time of one."""
    rounds = _rounds_in_graph(calls, target_ms) if device.type == "cuda" else _rounds_on_cpu(calls, target_ms)
    return Timing(statistics.median(rounds) * 1e3 / len(calls), min(rounds) * 1e3 / len(calls))


def _replays(one_ms: float, target_ms: float) -> int:
    return max(MIN_REPLAYS, min(MAX_REPLAYS, int(target_ms / max(one_ms, 1e-3))))


def _rounds_in_graph(calls: Sequence[Callable[[], Any]], target_ms: float) -> list[float]:
    """Milliseconds of each round. In a graph the host's speed does not count, as in an engine's decode step."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # outside the graph first: lazy set-up must not be captured
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()

    def replay(times: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
        for begin, end in events:
            begin.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]

    replay(1)
    (one_ms,) = replay(1)
    replay(max(1, min(10, int(10 / max(one_ms, 1e-3)))))  # until the clock has settled
    return replay(_replays(one_ms, target_ms))


def _rounds_on_cpu(calls: Sequence[Callable[[], Any]], target_ms: float) -> list[float]:
    def one_round() -> float:
        begin = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begin) * 1e3

    one_round()
    return [one_round() for _ in range(_replays(one_round(), target_ms))]
