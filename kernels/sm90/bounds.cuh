// The check mode of kernels/include/flashmla/bounds.h: how a fault is reported, and what the decode
// kernel looks at.
#pragma once

#include "sm90/decode_shared.cuh"

namespace flashmla {

// Keeps the first fault: later ones are dropped until the host has read it.
__device__ __forceinline__ void report_fault(flashmla_fault_box* box, const flashmla_fault& found) {
  auto* lock = reinterpret_cast<unsigned long long*>(&box->lock);
  if (atomicCAS(lock, 0ull, 1ull) != 0) return;  // another thread is about to report
  __threadfence_system();
  volatile flashmla_fault* fault = box->fault;
  if (fault->kind == FLASHMLA_FAULT_NONE) {
    fault->request = found.request;
    fault->column = found.column;
    fault->value = found.value;
    fault->accepted = found.accepted;
    __threadfence_system();
    fault->kind = found.kind;
  }
  __threadfence_system();
  atomicExch(lock, 0ull);
}

__device__ __forceinline__ int tiles_of(int tokens) {
  return tokens > 0 ? (tokens - 1) / kTileTokens + 1 : 0;
}

// Tokens of a request; none where they are not those that were planned, so that nothing is read
// which the plan does not know.
__device__ __forceinline__ int request_length(const DecodeArguments& a, int request) {
  const int length = __ldg(a.seq_lens + request);
  if (a.planned_lens == nullptr) return length;
  return tiles_of(length) == tiles_of(__ldg(a.planned_lens + request)) ? length : 0;
}

// By one warp: reports a request among the items whose length is not the planned one. A planned
// length of -1 has been reported already.
__device__ __forceinline__ void report_stale_plan(const DecodeArguments& a, int first, int last) {
  if (a.planned_lens == nullptr) return;
  for (int i = first + threadIdx.x % 32; i < last; i += 32) {
    const int request = Item(__ldg(a.items + i)).request;
    const int length = __ldg(a.seq_lens + request), planned = __ldg(a.planned_lens + request);
    if (planned >= 0 && tiles_of(length) != tiles_of(planned))
      report_fault(a.faults, {FLASHMLA_FAULT_PLAN, request, 0, length, planned});
  }
}

}  // namespace flashmla
