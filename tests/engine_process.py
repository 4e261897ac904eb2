"""An engine in a process of its own, by the engine_run.py of its tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.greedy import NEW_TOKENS


def answered(
    script: Path,
    batches: list[list[list[int]]],
    engine: dict[str, Any],
    environment: dict[str, str],
    folder: Path,
    new_tokens: int = NEW_TOKENS,
) -> tuple[dict[str, Any], str]:
    """What the script answered, and what the engine logged.

    batches: prompts, as token ids, that are answered together; one batch after the other.
    engine: keyword arguments of the engine's Python class.
    folder: for the request and the answer.
    new_tokens: of each answer.
    """
    request, answer = folder / "request.json", folder / "answer.json"
    request.write_text(json.dumps({"engine": engine, "batches": batches, "new_tokens": new_tokens}))
    process = subprocess.run(
        [sys.executable, str(script), str(request), str(answer)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert process.returncode == 0 and answer.exists(), process.stdout[-8000:]
    return json.loads(answer.read_text()), process.stdout
