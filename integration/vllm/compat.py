"""Which vLLM we serve, and how its releases differ where our classes touch them.

Differences between 0.26 and 0.33, and the one place that absorbs each:

    0.26 has no MLA on the CPU                          check_version(..., oldest=OLDEST_WITH_CPU_MLA)
    `_build_decode` gains `max_query_len` after 0.26    uniform_query_len(), from what all releases pass
    `do_kv_cache_update` gains `skip_scale` in 0.33     FlashMLAImpl passes trailing arguments on
    kernel block sizes are asked for a spec after 0.26  FlashMLABackend takes `kv_cache_spec=None`
    pages may lie further apart in 0.33                 core and cache write go by the cache's strides
    DCP is on by default in 0.26, off in 0.33           FlashMLAImpl spells supports_dcp out
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import claim

if TYPE_CHECKING:
    import torch

OLDEST = (0, 26)
OLDEST_WITH_CPU_MLA = (0, 32)
NEWEST = (0, 33)


def check_version(found: str, *, oldest: tuple[int, int] = OLDEST) -> None:
    """Raises Unsupported unless vLLM `found` (its `__version__`) lies in oldest .. NEWEST."""
    claim.check_version("vLLM", found, oldest, NEWEST)


def uniform_query_len(query_start_loc: torch.Tensor) -> int:
    """New tokens per decoding request, from their offsets ([B + 1] int32, on the CPU).

    All requests of a decode batch have equally many, except rows of padding, which have none.
    """
    return int((query_start_loc[1:] - query_start_loc[:-1]).max())
