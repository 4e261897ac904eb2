"""Our plugin and classes imported with the vLLM that is found first: `python -m tests.vllm.releases.claim`.

Prints as JSON who serves FLASHMLA, what our classes leave abstract, and why vLLM would refuse them on a Hopper GPU.
"""

from __future__ import annotations

import inspect
import json

import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from flashmla_backend.integration.vllm import plugin

plugin._check_hardware = lambda: None  # this machine need not be one that we serve
plugin.claim_flashmla()
backend = AttentionBackendEnum.FLASHMLA.get_class()
classes = (backend, backend.get_builder_cls(), backend.get_impl_cls())
layer = {
    "device_capability": DeviceCapability(9, 0),
    "head_size": 576,
    "dtype": torch.bfloat16,
    "kv_cache_dtype": "auto",
    "block_size": 64,
    "use_mla": True,
    "attn_type": AttentionType.DECODER,
}
asked = inspect.signature(backend.validate_configuration).parameters
plain = {name: False for name, parameter in asked.items() if parameter.default is parameter.empty}
print(
    json.dumps(
        {
            "claimed": AttentionBackendEnum.FLASHMLA.get_path(),
            "abstract": sorted(name for made in classes for name in getattr(made, "__abstractmethods__", ())),
            "refusals": backend.validate_configuration(**{**plain, **layer}),
        }
    )
)
