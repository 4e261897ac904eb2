"""One start of the real engine, in a process of its own: `python engine_run.py request.json answer.json`.

request: {"engine": keyword arguments of sglang.Engine, "batches": [[prompt token ids, ...], ...], "new_tokens": int}
answer: {"tokens": [[ids, ...], ...], "cached": [[int, ...], ...]}

Batches run one after the other, so a later one can find an earlier one's pages. What SGLang logs goes to stdout.
SGLang's workers import this file anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from flashmla_backend.integration.sglang import cpu

cpu.prepare()


def main(request_path: str, answer_path: str) -> None:
    from sglang.srt.entrypoints.engine import Engine

    request = json.loads(Path(request_path).read_text())
    engine = Engine(**request["engine"])
    sampling = {"temperature": 0, "max_new_tokens": request["new_tokens"], "ignore_eos": True}
    answer: dict[str, Any] = {"tokens": [], "cached": []}
    for batch in request["batches"]:
        outputs = engine.generate(input_ids=batch, sampling_params=sampling)
        answer["tokens"].append([output["output_ids"] for output in outputs])
        answer["cached"].append([output["meta_info"]["cached_tokens"] for output in outputs])
    Path(answer_path).write_text(json.dumps(answer))
    engine.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
