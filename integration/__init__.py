"""Adapters from engines to the API of flashmla_backend: one package an engine."""
