"""What is asked of a server: requests at a rate, or so many at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from flashmla_backend.errors import InvalidArgument

LEAST_PROMPTS = 4


@dataclass(frozen=True)
class Load:
    """Requests of random prompts: `value` a second, arriving as in a Poisson process, or always `value` at once."""

    kind: Literal["rate", "concurrency"]
    value: float
    prompts: int

    @property
    def name(self) -> str:
        return f"{self.value:g}/s" if self.kind == "rate" else f"{self.value:g} at once"

    def arguments(self) -> list[str]:
        """Of `vllm bench serve`."""
        count = ["--num-prompts", str(self.prompts)]
        if self.kind == "rate":
            return [*count, "--request-rate", f"{self.value:g}"]
        return [*count, "--request-rate", "inf", "--max-concurrency", f"{self.value:g}"]


def make_loads(rates: str, concurrency: str, seconds: float, rounds: int) -> list[Load]:
    """Rates for about `seconds` each, numbers at once `rounds` times over.

    rates, concurrency: numbers separated by commas, or nothing. Raises InvalidArgument for what is none.
    """
    loads = [Load("rate", rate, max(LEAST_PROMPTS, math.ceil(rate * seconds))) for rate in _numbers("rates", rates)]
    for value in _numbers("concurrency", concurrency):
        if value != int(value):
            raise InvalidArgument(f"concurrency has {value:g}; accepted: whole numbers")
        loads.append(Load("concurrency", value, int(value) * rounds))
    if not loads:
        raise InvalidArgument("rates and concurrency are both empty; name at least one load")
    return loads


def _numbers(name: str, text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",") if text]
    except ValueError:
        values = [0.0]
    if not all(0 < value < math.inf for value in values):
        raise InvalidArgument(f"{name} is {text!r}; accepted: positive numbers separated by commas")
    return values
