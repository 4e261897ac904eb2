"""GPU kernels of a stretch of work, from a trace, and which of them are attention."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

# Decode, its schedule and its combine step in ours, FlashMLA, FlashAttention-3 and Triton; writing the cache is not.
ATTENTION = re.compile(
    r"flashmla::|flash_fwd|get_mla_metadata|get_decoding_sched|flash::|FlashAttnFwd|prepare_varlen"
    r"|_fwd_(grouped_)?kernel_stage|_fwd_kernel_stage",
)


class Launch(NamedTuple):
    """One kernel's stay on the GPU, in microseconds."""

    name: str
    begin: float
    end: float


def traced_launches(work: Callable[[], object]) -> list[Launch]:
    """Every kernel that ran, those inside CUDA graphs included."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        work()
    return [
        Launch(event.name, event.time_range.start, event.time_range.end)
        for event in trace.events() or ()
        if event.device_type == DeviceType.CUDA
    ]


def busy_us(launches: Iterable[Launch]) -> float:
    """Microseconds in which any of them ran: with programmatic launches one may be there while it waits for another."""
    busy, until = 0.0, float("-inf")
    for launch in sorted(launches, key=lambda launch: launch.begin):
        busy += max(0.0, launch.end - max(launch.begin, until))
        until = max(until, launch.end)
    return busy


def attention_us(launches: Iterable[Launch]) -> float:
    return busy_us(launch for launch in launches if ATTENTION.search(launch.name))


def busiest(launches: Iterable[Launch], count: int) -> list[tuple[str, float]]:
    """Names and microseconds, summed over launches, of those that stayed longest."""
    times: defaultdict[str, float] = defaultdict(float)
    for launch in launches:
        times[launch.name] += launch.end - launch.begin
    return sorted(times.items(), key=lambda item: -item[1])[:count]
