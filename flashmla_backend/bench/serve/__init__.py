"""Serving over HTTP: time to the first token, time per further token and throughput, backend by backend.

The load is made by the engine's own generator: the one behind `vllm bench serve`, or `sglang.benchmark.serving`.
"""
