"""engine_run.py with DCP on the CPU, which SGLang refuses as a platform. Its Triton kernels run in an interpreter."""

from __future__ import annotations

import sys

from engine_run import main
from sglang.srt.distributed import parallel_state

parallel_state.is_cuda = lambda: True  # asked where the groups of DCP are made, only
parallel_state._is_cpu = True  # torch's collectives; False also on CPUs without AMX

if __name__ == "__main__":
    main(*sys.argv[1:])
