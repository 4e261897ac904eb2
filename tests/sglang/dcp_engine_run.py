"""engine_run.py with DCP on the CPU, which SGLang refuses as a platform; its Triton kernels run in an interpreter."""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

from engine_run import main
from sglang.srt.distributed import parallel_state

parallel_state.is_cuda = lambda: True  # asked where the DCP groups are made, only
parallel_state._is_cpu = True  # with AMX only, otherwise; collectives of SGLang's own else

if __name__ == "__main__":
    main(*sys.argv[1:])
