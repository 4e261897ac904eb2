"""The errors this package raises on purpose; every message names the cause and the way out."""

from __future__ import annotations


class FlashMLAError(Exception):
    """Base of every error raised by flashmla_backend."""


class InvalidArgument(FlashMLAError, ValueError):
    """An argument has a shape, dtype, stride or value outside what the message lists as accepted."""


class OutOfBounds(InvalidArgument):
    """Values that an earlier step was given, as FLASHMLA_CHECK_BOUNDS=1 found them on the device."""


class Unsupported(FlashMLAError, NotImplementedError):
    """The request is well formed, but this build, device or engine version cannot serve it."""
