// Batch-invariant mode: merging the results of leaves as a tree.
//
// The decode kernel merges what one thread block computes, the combine kernel what several did.
// Both do it by the functions below, every rounding of which is spelled out, so that a tree has one
// value wherever it is cut.
#pragma once

#include "sm90/decode_shared.cuh"
#include "sm90/leaves.cuh"
#include "sm90/softmax.cuh"

namespace flashmla {

// Log-sum-exp of two siblings, and what their results weigh.
struct Siblings {
  float lse, first, second;
};

__device__ __forceinline__ Siblings join(float first_lse, float second_lse) {
  constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
  const float most = fmaxf(first_lse, second_lse);
  if (most == kNegativeInfinity) return {kNegativeInfinity, 0.0f, 0.0f};
  const float first = exp2_fast(__fmul_rn(__fsub_rn(first_lse, most), kLog2E));
  const float second = exp2_fast(__fmul_rn(__fsub_rn(second_lse, most), kLog2E));
  const float sum = __fadd_rn(first, second), inverse = reciprocal_fast(sum);
  return {__fmaf_rn(log2_fast(sum), kLn2, most), __fmul_rn(first, inverse),
          __fmul_rn(second, inverse)};
}

__device__ __forceinline__ float merge(const Siblings& s, float first, float second) {
  return __fmaf_rn(s.second, second, __fmul_rn(s.first, first));
}

// The subtrees that wait for their sibling, in global memory: the group of leaves so far, which is
// small enough for all thread blocks to stay in L2, then groups and what they were merged to, at
// most one of each height. A thread reads only what it wrote: its 128 values of O as vectors that a
// warp stores side by side, then its LSEs.
//
// Loads are what merging waits for. `kAhead` vectors are on their way before the leaf is complete.
template <int kAhead>
class Subtrees {
  static constexpr int kWindow = 8;

 public:
  // Of a sibling, as much as is on its way at a time.
  struct Window {
    float2 lse;
    float4 x[kWindow];
  };

  // `half` of O: 0 left, 1 right.
  __device__ __forceinline__ Subtrees(const DecodeArguments& a, int row_begin, int half)
      : real_(row_begin + accumulator_row(0) < a.rows) {
    const int warps = (min(kTileRows, a.rows) + 15) / 16;
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    stride_ = 2 * warps * kVectors * 32;
    own_ = a.subtrees + static_cast<int64_t>(block) * subtree_rooms(a.max_leaves) * stride_ +
           (half * warps + threadIdx.x % 128 / 32) * kVectors * 32 + threadIdx.x % 32;
  }

  // Starts loading the first sibling of leaf `number` of an item.
  __device__ __forceinline__ void start(int number, Window& window) const {
    if (kAhead > 0 && siblings_of(number) > 0) start_loads(own_, window);
  }

  // Takes in the leaf, O not yet normalised. Afterwards `o` and `lse` are those of the largest
  // subtree that it completes.
  __device__ __forceinline__ void add(int number, float (&o)[128], const float (&inverse_sum)[2],
                                      float (&lse)[2], Window& window) const {
#pragma unroll
    for (int i = 0; i < 128; ++i) {
      // A row that sees no token of the leaf gets nothing from it, NaN neither.
      const float factor = inverse_sum[(i >> 1) & 1], x = __fmul_rn(o[i], factor);
      o[i] = factor == 0.0f ? 0.0f : x;
    }
    const int siblings = siblings_of(number);
    const float4* sibling = own_;
#pragma unroll 1
    for (int i = 0; i < siblings; ++i, sibling += stride_) {
      if (kAhead == 0 || i > 0) start_loads(sibling, window);
      load<kAhead, kWindow>(sibling, window);
      const Siblings rows[2] = {join(window.lse.x, lse[0]), join(window.lse.y, lse[1])};
      lse[0] = rows[0].lse, lse[1] = rows[1].lse;
#pragma unroll
      for (int v = 0; v < kVectors - 1; ++v) {
        const float4 x = window.x[v % kWindow];
        o[4 * v] = merge(rows[0], x.x, o[4 * v]);
        o[4 * v + 1] = merge(rows[0], x.y, o[4 * v + 1]);
        o[4 * v + 2] = merge(rows[1], x.z, o[4 * v + 2]);
        o[4 * v + 3] = merge(rows[1], x.w, o[4 * v + 3]);
        if (v % kChunk == kChunk - 1) {
#pragma unroll
          for (int next = v + 1 - kChunk + kWindow; next < min(v + 1 + kWindow, kVectors - 1);
               ++next)
            window.x[next % kWindow] = load(sibling + 32 * next);
        }
      }
    }
  }

  // Keeps the subtree that leaf `number` completed, until its sibling is there.
  __device__ __forceinline__ void keep(int number, const float (&o)[128],
                                       const float (&lse)[2]) const {
    float4* room = own_ + room_of(number) * stride_;
#pragma unroll
    for (int i = 0; i < kVectors - 1; ++i)
      store(room + 32 * i, make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]));
    store(room + 32 * (kVectors - 1), make_float4(lse[0], lse[1], 0.0f, 0.0f));
  }

 private:
  static constexpr int kVectors = 128 / 4 + 1;
  static constexpr int kChunk = 4;  // vectors that are waited for together
  static_assert(2 * kVectors * 32 * 4 == FLASHMLA_SUBTREE_FLOATS_OF_16_ROWS, "as callers allocate");

  __device__ __forceinline__ void start_loads(const float4* room, Window& window) const {
    const auto* lse = reinterpret_cast<const float2*>(room + 32 * (kVectors - 1));
    window.lse = real_ ? __ldcg(lse) : float2{};
    load<0, kAhead>(room, window);
  }

  template <int kBegin, int kEnd>
  __device__ __forceinline__ void load(const float4* room, Window& window) const {
#pragma unroll
    for (int v = kBegin; v < kEnd; ++v) window.x[v] = load(room + 32 * v);
  }

  // Only for rows that exist; a branch around all would take registers that O needs.
  __device__ __forceinline__ float4 load(const float4* from) const {
    return real_ ? __ldcg(from) : float4{};
  }
  __device__ __forceinline__ void store(float4* to, float4 x) const {
    if (real_) __stcg(to, x);
  }

  const bool real_;
  float4* own_;
  int stride_;
};

}  // namespace flashmla
