"""How long a call takes: medians of CUDA-graph replays on a GPU, of plain loops on the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

MIN_REPLAYS, MAX_REPLAYS = 3, 60

Rounds = Callable[[float], list[float]]  # about so many milliseconds -> milliseconds of each round


class Timing(NamedTuple):
    """Microseconds of one call."""

    median_us: float
    least_us: float


class Stopwatch:
    """Times the same calls as often as asked, so that contenders can take turns and one hiccup of the machine does not
    decide."""

    def __init__(self, calls: Sequence[Callable[[], Any]], device: torch.device):
        self.calls = calls  # a graph does not keep alive what it works on
        self.rounds = _rounds_in_graph(calls) if device.type == "cuda" else _rounds_on_cpu(calls)

    def measure(self, target_ms: float = 40) -> Timing:
        """Run all calls back to back, again and again for about `target_ms`; the time of one."""
        rounds = self.rounds(target_ms)
        return Timing(statistics.median(rounds) * 1e3 / len(self.calls), min(rounds) * 1e3 / len(self.calls))


def time_calls(calls: Sequence[Callable[[], Any]], device: torch.device, target_ms: float = 40) -> Timing:
    return Stopwatch(calls, device).measure(target_ms)


def _replays(one_ms: float, target_ms: float) -> int:
    return max(MIN_REPLAYS, min(MAX_REPLAYS, int(target_ms / max(one_ms, 1e-3))))


def _rounds_in_graph(calls: Sequence[Callable[[], Any]]) -> Rounds:
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

    def rounds(target_ms: float) -> list[float]:
        replay(1)
        (one_ms,) = replay(1)
        replay(max(1, min(10, int(10 / max(one_ms, 1e-3)))))  # until the clock has settled
        return replay(_replays(one_ms, target_ms))

    return rounds


def _rounds_on_cpu(calls: Sequence[Callable[[], Any]]) -> Rounds:
    def one_round() -> float:
        begin = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begin) * 1e3

    def rounds(target_ms: float) -> list[float]:
        one_round()
        return [one_round() for _ in range(_replays(one_round(), target_ms))]

    return rounds
