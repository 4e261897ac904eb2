"""Multi-head latent attention decode for DeepSeek-V2/V3-class models: one plan a step, one call a layer.

Names are loaded at first use, so that importing the package (as engines do in every process) costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashmla_backend.api import mla_decode, plan_decode
    from flashmla_backend.errors import FlashMLAError, InvalidArgument, OutOfBounds, Unsupported
    from flashmla_backend.plan import DecodePlan
    from flashmla_backend.ragged import plan_ragged_decode

__all__ = [
    "DecodePlan",
    "FlashMLAError",
    "InvalidArgument",
    "OutOfBounds",
    "Unsupported",
    "mla_decode",
    "plan_decode",
    "plan_ragged_decode",
]

_HOME = {
    "DecodePlan": "plan",
    "FlashMLAError": "errors",
    "InvalidArgument": "errors",
    "OutOfBounds": "errors",
    "Unsupported": "errors",
    "mla_decode": "api",
    "plan_decode": "api",
    "plan_ragged_decode": "ragged",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version("flashmla_backend")
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
