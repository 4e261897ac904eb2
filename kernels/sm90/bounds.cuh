// The check mode of kernels/include/flashmla/bounds.h: how a fault is reported, and what the decode
// kernel looks at.
#pragma once

#include <cmath>

#include "sm90/decode_shared.cuh"
#include "sm90/ptx/sync.cuh"

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

// Tokens of a request; none where they are not those that were planned, so that nothing is read
// which the plan does not know.
__device__ __forceinline__ int request_length(const DecodeArguments& a, int request) {
  const int length = __ldg(a.seq_lens + request);
  if (a.planned_lens == nullptr) return length;
  return pages_of(length) == pages_of(__ldg(a.planned_lens + request)) ? length : 0;
}

// Whether two lengths take the same pages of less than 64 tokens, or the same tiles; 0 tokens are
// like the -1 of a request at fault.
__device__ __forceinline__ bool same_boxes(const DecodeArguments& a, int length, int planned) {
  return ((max(length, 0) - 1) ^ (max(planned, 0) - 1)) >> a.box_log2 == 0;
}

// Boxes of a request's tokens that may be read, as `request_length` but by small pages.
__device__ __forceinline__ int request_boxes(const DecodeArguments& a, int request) {
  const int length = __ldg(a.seq_lens + request);
  if (a.planned_lens != nullptr && !same_boxes(a, length, __ldg(a.planned_lens + request)))
    return 0;
  return ((length - 1) >> a.box_log2) + 1;
}

// By one warp: reports a request among the items whose length is not the planned one. A planned
// length of -1 has been reported already.
__device__ __forceinline__ void report_stale_plan(const DecodeArguments& a, int first, int last) {
  if (a.planned_lens == nullptr) return;
  for (int i = first + threadIdx.x % 32; i < last; i += 32) {
    const int request = Item(__ldg(a.items + i)).request;
    const int length = __ldg(a.seq_lens + request), planned = __ldg(a.planned_lens + request);
    if (planned >= 0 && !same_boxes(a, length, planned))
      report_fault(a.faults, {FLASHMLA_FAULT_PLAN, request, 1 << a.box_log2, length, planned});
  }
}

constexpr int kEmptyThreads = 256;

// For small pages, one thread block per request: empties the answer where the plan is old by less
// than a tile, which `request_length` lets pass: the decode kernel has no register left to see it.
template <typename Element>
__global__ void __launch_bounds__(kEmptyThreads)
    empty_stale_kernel(const __grid_constant__ DecodeArguments a) {
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  const int request = blockIdx.x;
  if (same_boxes(a, __ldg(a.seq_lens + request), __ldg(a.planned_lens + request))) return;
  const int64_t rows = int64_t{1} * a.s_q * a.h_q, first = request * rows;
  auto* out = reinterpret_cast<uint4*>(static_cast<Element*>(a.out) + first * kLatent);
  for (int64_t i = threadIdx.x; i < rows * (kLatent / 8); i += kEmptyThreads) out[i] = uint4{};
  for (int64_t i = threadIdx.x; i < rows; i += kEmptyThreads) a.lse[first + i] = -INFINITY;
}

}  // namespace flashmla
