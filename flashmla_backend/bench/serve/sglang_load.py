"""SGLang's load generator in a process of its own: `python -m flashmla_backend.bench.serve.sglang_load loads.json`.

loads.json: {name: [arguments of `sglang.benchmark.serving`]}. Says `@ name` on standard output before each load.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

from flashmla_backend.bench.child import say
from flashmla_backend.integration.sglang import cpu


def main(path: str) -> None:
    cpu.prepare()
    stand_in_for_datasets()
    from sglang.benchmark import serving

    for name, arguments in json.loads(Path(path).read_text()).items():
        say(name)
        sys.argv[1:] = arguments
        serving.cli_main()


def stand_in_for_datasets() -> None:
    """The generator imports Hugging Face's `datasets` whatever it sends, and random prompts are not from there."""
    if importlib.util.find_spec("datasets") is None:
        module = sys.modules["datasets"] = importlib.util.module_from_spec(ModuleSpec("datasets", None))
        module.load_dataset = None  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(*sys.argv[1:])
