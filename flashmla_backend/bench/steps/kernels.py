"""GPU kernels of a stretch of work, from a trace, and which of them are attention."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

# Decode, its schedule and its combine step in ours, FlashMLA, FlashAttention-3 and Triton; writing the cache is not.
ATTENTION = re.compile(
    r"flashmla::|flash_fwd|get_mla_metadata|get_decoding_sched|flash::|FlashAttnFwd|prepare_varlen"
    r"|_fwd_(grouped_)?kernel_stage|_fwd_kernel_stage",
)


def traced_kernels(work: Callable[[], object]) -> dict[str, float]:
    """Kernel name -> microseconds, summed over its launches. Those inside CUDA graphs count."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        work()
    times: Counter[str] = Counter()
    for event in trace.events() or ():
        if event.device_type == DeviceType.CUDA:
            times[event.name] += event.time_range.elapsed_us()
    return dict(times)


def attention_us(kernels: dict[str, float]) -> float:
    return sum(us for name, us in kernels.items() if ATTENTION.search(name))
