"""Serving over HTTP: time to the first token, time per further token and throughput, backend by backend.

The load is made by vLLM's own generator, the one behind `vllm bench serve`. It asks any OpenAI-compatible server.
"""
