"""What every engine's plugin does alike: follow our variables, check the engine's version, and never raise."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeVar

from flashmla_backend.errors import Unsupported

Result = TypeVar("Result")

DISABLE_VARIABLE = "FLASHMLA_BACKEND_DISABLE"
BATCH_INVARIANT_VARIABLE = "FLASHMLA_BACKEND_BATCH_INVARIANT"


def disabled() -> bool:
    return _is_set(DISABLE_VARIABLE)


def asked_for_batch_invariance() -> bool:
    return _is_set(BATCH_INVARIANT_VARIABLE)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def guarded(logger: logging.Logger, step: Callable[[], Result], consequence: str) -> Result | None:
    """The step's result; where it refuses or fails, None, and in the log why and what follows from it."""
    try:
        return step()
    except Unsupported as refusal:
        logger.warning("flashmla_backend: %s; %s", refusal, consequence)
    except Exception:
        logger.exception("flashmla_backend failed to load; %s", consequence)
    return None


def check_version(engine: str, found: str, oldest: tuple[int, ...], newest: tuple[int, ...]) -> None:
    """Raises Unsupported unless `found` (the engine's `__version__`) lies in oldest .. newest, both included.

    Releases are compared by as many numbers as `oldest` has: 0.33.1 is 0.33 where that has two.
    """
    from packaging.version import InvalidVersion, Version

    accepted = f"{_dotted(oldest)} to {_dotted(newest)}"
    way_out = f"install one of those, or set {DISABLE_VARIABLE}=1 to run {engine} {found} on its own"
    try:
        release = Version(found).release[: len(oldest)]
    except InvalidVersion:
        raise Unsupported(
            f"{engine}'s version is {found!r}, which is no version number; {engine} {accepted} works: {way_out}"
        ) from None
    if not oldest <= release <= newest:
        raise Unsupported(f"{engine} {found} is not supported; {engine} {accepted} works: {way_out}")


def check_gpu(engine: str, name: str, capability: tuple[int, int]) -> None:
    """Raises Unsupported unless our own kernels run on a GPU of this name and compute capability."""
    from flashmla_backend.dispatch import why_no_kernels

    if reason := why_no_kernels(capability):
        raise Unsupported(
            f"{name} (compute capability {capability[0]}.{capability[1]}) has no decode kernels that {engine} could "
            f"capture in a CUDA graph: {reason}, and FlashInfer, which the Python API uses on other GPUs, plans on the "
            "host"
        )


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
