"""Steps of an engine by what is in them: how many, and how long they take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

KINDS = ("decode", "mixed", "prompts")


def kind_of(scheduled: Collection[int]) -> str:
    """scheduled: tokens of each request in the step. One token is a decode, for attention a prompt's last one too."""
    decodes = sum(tokens == 1 for tokens in scheduled)
    return "decode" if decodes == len(scheduled) else "mixed" if decodes else "prompts"


@dataclass
class StepClock:
    """Counts the steps of an engine in this process, and the seconds from the end of the one before to theirs.

    The first step's begin with `restart`, so that they hold the handing over of all requests.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    ended: float = 0.0

    def restart(self) -> None:
        self.seconds = {kind: [] for kind in KINDS}
        self.ended = time.perf_counter()

    def watch(self, llm: Any) -> None:
        """From now on, of this vllm.LLM: the scheduler hears of a step as soon as its tokens are on the host."""
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        update = scheduler.update_from_output

        def timed(scheduled: Any, *outputs: Any) -> Any:
            if scheduled.num_scheduled_tokens:
                now = time.perf_counter()
                self.seconds[kind_of(scheduled.num_scheduled_tokens.values())].append(now - self.ended)
                self.ended = now
            return update(scheduled, *outputs)

        scheduler.update_from_output = timed

    def summary(self) -> dict[str, dict[str, float]]:
        """{kind: {count, seconds, median_ms}} of the kinds that there were; the median hears no single compilation."""
        return {
            kind: {
                "count": len(seconds),
                "seconds": round(sum(seconds), 4),
                "median_ms": round(statistics.median(seconds) * 1e3, 4),
            }
            for kind, seconds in self.seconds.items()
            if seconds
        }
