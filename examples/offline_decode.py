"""One decode step through the API, with no engine: plan it, run it, compare it with the reference.

python examples/offline_decode.py [--heads 16] [--dtype bfloat16] [LENGTH ...]
"""

from __future__ import annotations

import argparse

import torch

from flashmla_backend import mla_decode, plan_decode, reference

PAGE = 64  # tokens per page of the KV cache
SCALE = (128 + 64) ** -0.5  # DeepSeek's: one over the root of the head dim before absorption


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode one token for each of several requests.")
    parser.add_argument("lengths", nargs="*", type=int, default=[1, 64, 65, 700, 3000], metavar="LENGTH")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)

    # What an engine has: lengths, a cache of pages, and a table that says which pages are whose.
    seq_lens = torch.tensor(arguments.lengths, dtype=torch.int32)  # [B]
    pages_per_request = -(-int(seq_lens.max()) // PAGE)
    pages = len(arguments.lengths) * pages_per_request
    block_table = torch.randperm(pages).int().view(-1, pages_per_request)  # [B, W]
    kv_cache = torch.randn(pages, PAGE, 1, 576).to(dtype)  # [P, 64, H_kv, 512 latent + 64 rope]
    q = torch.randn(len(arguments.lengths), 1, arguments.heads, 576).to(dtype)  # [B, S_q, H_q, 576]

    plan = plan_decode(seq_lens, block_table, s_q=1, h_q=arguments.heads, page_size=PAGE, num_sms=4)
    print(plan)
    out, lse = mla_decode(q, kv_cache, plan, softmax_scale=SCALE)  # once per layer, all with the same plan

    expected, expected_lse = reference.mla_decode(q, kv_cache, block_table, seq_lens, softmax_scale=SCALE)
    print(f"out {list(out.shape)} {out.dtype}, lse {list(lse.shape)} {lse.dtype}")
    error, lse_error = _error(out, expected), _error(lse, expected_lse)
    print(f"largest error against the fp64 reference: out {error:.2e}, lse {lse_error:.2e}")


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found.double() - expected.double()).abs().max().item()


if __name__ == "__main__":
    main()
