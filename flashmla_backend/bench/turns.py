"""Turns: each backend measured several times, in processes of its own."""

from __future__ import annotations

from collections.abc import Sequence


def in_turns(backends: Sequence[str], turns: int) -> list[tuple[int, str]]:
    """Turn and backend. Every other turn goes backwards: whoever is first pays for cold caches."""
    return [
        (turn, backend) for turn in range(1, turns + 1) for backend in (backends if turn % 2 else reversed(backends))
    ]
