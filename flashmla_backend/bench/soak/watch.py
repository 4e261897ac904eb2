"""What can be seen of a server from outside: its own counters, and the memory of its processes and of the GPU."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "prefix_hits": "vllm:prefix_cache_hits_total",
    "drafted": "vllm:spec_decode_num_draft_tokens_total",
    "accepted": "vllm:spec_decode_num_accepted_tokens_total",
    "generated": "vllm:generation_tokens_total",
}
BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting")


def read(metrics: str, name: str) -> float:
    """The sum of one of a server's Prometheus metrics, 0 if there is none."""
    values = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", metrics, flags=re.MULTILINE)
    return sum(map(float, values))


def host_mib(group: int) -> float:
    """Resident memory of the processes of a group."""
    pages = 0
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and os.getpgid(int(folder.name)) == group:
                pages += int((folder / "statm").read_text().split()[1])
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            continue  # it ended meanwhile
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def gpu_mib() -> float:
    """Memory in use on the GPU, by anyone; 0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20
