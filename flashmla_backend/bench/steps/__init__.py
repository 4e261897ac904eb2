"""Decode steps of the whole engine: milliseconds, attention's share, and how far backends' answers lie apart.

Contexts are not prefilled: vLLM's own DecodeBenchConnector fills the pages of a request with random rows, the same for
every backend, and the engine takes them for a prefix that another machine computed.
"""
