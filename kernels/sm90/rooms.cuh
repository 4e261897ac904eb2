// Batch-invariant mode: merging the results of leaves as a binary tree.
//
// Every node but the root is rounded to fp16 as partial results are, also where it stays in
// registers, and every rounding is spelled out: a node has one value wherever a request is cut.
// The decode kernel merges what one thread block computes, the combine kernel what several did.
#pragma once

#include "sm90/decode_shared.cuh"
#include "sm90/leaves.cuh"
#include "sm90/output.cuh"
#include "sm90/ptx/keep.cuh"
#include "sm90/softmax.cuh"

namespace flashmla {

// What the normalised values of two parts of a row weigh in both together.
struct MergeWeights {
  float first, second, lse;

  __device__ __forceinline__ MergeWeights(float first_lse, float second_lse) {
    constexpr float kLn2 = 0.6931471805599453f, kLog2E = 1.4426950408889634f;
    const float most = fmaxf(first_lse, second_lse);
    const float base = most == kNegativeInfinity ? 0.0f : most;  // no token: weights 0, not NaN
    first = exp2_fast(__fmul_rn(__fsub_rn(first_lse, base), kLog2E));
    second = exp2_fast(__fmul_rn(__fsub_rn(second_lse, base), kLog2E));
    const float sum = __fadd_rn(first, second);
    const float inverse = sum != 0.0f ? reciprocal_fast(sum) : 0.0f;
    first = __fmul_rn(first, inverse);
    second = __fmul_rn(second, inverse);
    lse = __fadd_rn(most, __fmul_rn(log2_fast(sum), kLn2));
  }
};

// Two values of a node from those of its children, which are fp16 and yet to be scaled.
__device__ __forceinline__ float2 merge_pair(uint32_t first, float first_scale, uint32_t second,
                                             float second_scale) {
  const float2 x = __half22float2(reinterpret_cast<const __half2&>(first));
  const float2 y = __half22float2(reinterpret_cast<const __half2&>(second));
  return {__fmaf_rn(y.x, second_scale, __fmul_rn(x.x, first_scale)),
          __fmaf_rn(y.y, second_scale, __fmul_rn(x.y, first_scale))};
}

// A row of a leaf or a subtree in registers; its O times `factor` is normalised.
struct RowResult {
  float lse, factor;
};

// Where the results of a thread block's subtrees wait for their neighbours, in global memory: a
// room for each size of subtree. It holds O of the left half, then of the right, then the states of
// both, each thread's vectors as a warp stores them side by side.
class Rooms {
 public:
  static constexpr int kVectors = 128 / 8;                           // of a thread's values, fp16
  static constexpr int kValueBytes = kVectors * 32 * sizeof(uint4);  // of a warp
  static constexpr int kStateBytes = 32 * sizeof(float4);
  static constexpr int kWarpBytes = 2 * (kValueBytes + kStateBytes);
  static_assert(kWarpBytes == 4 * FLASHMLA_ROOM_FLOATS_OF_16_ROWS, "as callers allocate");

  __device__ __forceinline__ Rooms(const DecodeArguments& a, int row_begin)
      : thread_(threadIdx.x % 128), warps_(warps_of(a.rows - row_begin)) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int levels = 31 - __clz(a.max_leaves);
    stride_ = warps_of(a.rows) * kWarpBytes;
    own_ = a.rooms + static_cast<int64_t>(block) * levels * stride_;
  }

  // Leaves this thread's values to wait in a room; `half` of O: 0 left, 1 right.
  __device__ __forceinline__ void store(int level, int half, const float (&o)[128],
                                        const RowResult (&rows)[2]) const {
    // Not a branch around all: it would take registers that O needs.
    const bool real = thread_ / 32 < warps_;
    float up[2], down[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Fp16Scale scale(largest_of_row(o, r) * rows[r].factor);
      up[r] = rows[r].factor * scale.up, down[r] = scale.down;
    }
    auto* to = reinterpret_cast<uint4*>(values(level, half)) + own_vector();
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (real)
        ptx::store_kept(to + 32 * i, make_uint4(pair(o, 4 * i, up), pair(o, 4 * i + 1, up),
                                                pair(o, 4 * i + 2, up), pair(o, 4 * i + 3, up)));
    }
    if (real)
      *(reinterpret_cast<float4*>(states(level)) + own_state(half)) =
          make_float4(rows[0].lse, down[0], rows[1].lse, down[1]);
  }

  // Takes up what waits in the rooms that are bits of `levels`, the lowest first.
  __device__ __forceinline__ void merge(uint32_t levels, int half, float (&o)[128],
                                        RowResult (&rows)[2]) const {
#pragma unroll 1
    for (; levels != 0; levels &= levels - 1) merge_room(__ffs(levels) - 1, half, o, rows);
  }

 private:
  static constexpr int kInFlight = 8;  // vectors

  __device__ __forceinline__ void merge_room(int level, int half, float (&o)[128],
                                             RowResult (&rows)[2]) const {
    const bool real = thread_ / 32 < warps_;
    const auto* from = reinterpret_cast<const uint4*>(values(level, half)) + own_vector();
    const uint4 waiting =
        load(real, reinterpret_cast<const uint4*>(states(level)) + own_state(half));
    uint4 x[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) x[i] = load(real, from + 32 * i);
    // Conditions on `common` always hold: no value has all bits set, NaN neither. They make the
    // compiler start these loads at once and each later one when a vector is merged, in that order;
    // it would start some late, or all at once, for which there are no registers.
    uint32_t common = x[0].x;
#pragma unroll
    for (int i = 1; i < kInFlight; ++i) common &= x[i].x;
    const bool arrived = common != ~0u;
    float first[2], second[2], up[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Fp16Scale scale(arrived ? largest_of_row(o, r) * rows[r].factor : 0.0f);
      const MergeWeights weights(__uint_as_float(r == 0 ? waiting.x : waiting.z), rows[r].lse);
      up[r] = rows[r].factor * scale.up;
      first[r] = __fmul_rn(weights.first, __uint_as_float(r == 0 ? waiting.y : waiting.w));
      second[r] = __fmul_rn(weights.second, scale.down);
      rows[r] = {weights.lse, 1.0f};
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint4 v = x[i % kInFlight];
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (float& scale : second) scale = common != ~0u ? scale : 0.0f;
      common = ~0u;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int word = 4 * i + j, r = word & 1;
        const float2 merged = merge_pair(words[j], first[r], pair(o, word, up), second[r]);
        o[2 * word] = merged.x, o[2 * word + 1] = merged.y;
        common &= __float_as_uint(merged.x) & __float_as_uint(merged.y);
      }
      if (i + kInFlight < kVectors)
        x[i % kInFlight] = load(real && common != ~0u, from + 32 * (i + kInFlight));
    }
    // Nobody reads it again before it is written again.
    __syncwarp();
    if (real && thread_ % 8 == 0) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) ptx::discard_line(from + 32 * i);
    }
  }

  __device__ __forceinline__ static uint4 load(bool real, const uint4* from) {
    return real ? ptx::load_kept(from) : uint4{};
  }

  __device__ __forceinline__ static int warps_of(int rows) {
    return (min(kTileRows, rows) + 15) / 16;
  }
  __device__ __forceinline__ uint8_t* values(int level, int half) const {
    return own_ + level * stride_ + half * warps_ * kValueBytes;
  }
  __device__ __forceinline__ uint8_t* states(int level) const { return values(level, 2); }
  __device__ __forceinline__ int own_vector() const {
    return thread_ / 32 * kVectors * 32 + thread_ % 32;
  }
  __device__ __forceinline__ int own_state(int half) const { return half * warps_ * 32 + thread_; }
  // Words alternate between this thread's two rows.
  __device__ __forceinline__ static uint32_t pair(const float (&o)[128], int word,
                                                  const float (&up)[2]) {
    return pack<__half>(o[2 * word] * up[word & 1], o[2 * word + 1] * up[word & 1]);
  }

  int thread_;  // of the warpgroup
  int warps_;   // whose rows exist
  int stride_;
  uint8_t* own_;
};

// The result of a leaf. A row that saw no token gets nothing from it, NaN neither.
__device__ __forceinline__ void finish_leaf(const RowState (&states)[2], float (&o)[128],
                                            RowResult (&rows)[2]) {
  rows[0] = {states[0].lse(), states[0].inverse()};
  rows[1] = {states[1].lse(), states[1].inverse()};
  if (!__any_sync(~0u, states[0].sum == 0.0f || states[1].sum == 0.0f)) return;
#pragma unroll
  for (int i = 0; i < 128; ++i) o[i] = states[(i >> 1) & 1].sum == 0.0f ? 0.0f : o[i];
}

}  // namespace flashmla
