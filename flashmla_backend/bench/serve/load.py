"""vLLM's load generator in a process of its own: `python -m flashmla_backend.bench.serve.load loads.json`.

loads.json: {name: [arguments of `vllm bench serve`]}. That command itself looks for a distribution named vllm, which a
CPU build is not. Says `@ name` on standard output before each load.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from flashmla_backend.bench.child import say


def main(path: str) -> None:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    for name, arguments in json.loads(Path(path).read_text()).items():
        say(name)
        serve(parser.parse_args(arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
