"""`python -m flashmla_backend.integration.sglang.server ARGUMENTS`: SGLang's server, also without a GPU.

SGLang starts its workers by importing this module anew in each, so what stands at the top runs there as well.
"""

from __future__ import annotations

import contextlib
import runpy

from flashmla_backend.integration.sglang import cpu

cpu.prepare()

if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # the server has shut down when it lets it through
        runpy.run_module("sglang.launch_server", run_name="__main__")
