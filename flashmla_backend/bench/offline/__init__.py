"""Throughput of vLLM without a server: all prompts are handed over at once, and prompts and decodes share steps."""
