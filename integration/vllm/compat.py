"""Which vLLM we serve, and how its releases differ where our classes touch them.

Differences between 0.26 and 0.33, and the one place that absorbs each:

    MLA on the CPU begins with 0.28, tests with 0.32    check_version(..., oldest=OLDEST_ON_CPU)
    `_build_decode` gains `max_query_len` in 0.31       FlashMLAMetadataBuilder divides what all releases pass
    `do_kv_cache_update` gains `skip_scale` in 0.33     FlashMLAImpl passes trailing arguments on
    kernel block sizes are asked for a spec from 0.31   FlashMLABackend takes `kv_cache_spec=None`
    pages may lie further apart in 0.33                 core and cache write go by the cache's strides
    DCP is on by default in 0.26, off in 0.33           FlashMLAImpl spells supports_dcp out
"""

from __future__ import annotations

from .. import claim

OLDEST = (0, 26)
OLDEST_ON_CPU = (0, 32)
NEWEST = (0, 33)


def check_version(found: str, *, oldest: tuple[int, int] = OLDEST) -> None:
    """Raises Unsupported unless vLLM `found` (its `__version__`) lies in oldest .. NEWEST."""
    claim.check_version("vLLM", found, oldest, NEWEST)
