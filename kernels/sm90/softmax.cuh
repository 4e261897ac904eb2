// Online softmax of one 64 x 64 tile of scores, held as the accumulator of m64n64 by one warpgroup.
//
// A thread holds columns 8 n + 2 (lane % 4) + {0, 1} of rows lane / 4 and lane / 4 + 8 of its
// warp's 16 rows: scores[4 n + 0, 1] belong to the first row, scores[4 n + 2, 3] to the second.
// With kThreadRows 1 there is no second one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "sm90/ptx/math.cuh"
#include "sm90/quad.cuh"

namespace flashmla {

constexpr float kNegativeInfinity = -__builtin_huge_valf();
constexpr float kLn2 = 0.6931471805599453f, kLog2E = 1.4426950408889634f;

// 1 / sum, 0 for a row that saw no token.
__device__ __forceinline__ float inverse_of(float sum) {
  return sum != 0.0f ? ptx::reciprocal_fast(sum) : 0.0f;
}

template <typename Element>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float2 unpack_halves(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// A row of O that is not normalised: exponents are relative to `anchor`, in log2 units, and `sum`
// is theirs; 0 for a row that saw no token, whatever its O. A sum that is no number must show: it
// is of the request's own tokens.
struct RowState {
  float anchor, sum;

  __device__ __forceinline__ float inverse() const { return inverse_of(sum); }
  // Natural log of the sum of exponentials, -inf for a row that saw no token.
  __device__ __forceinline__ float lse() const {
    return sum != 0.0f ? __fmul_rn(__fadd_rn(anchor, ptx::log2_fast(sum)), kLn2)
                       : kNegativeInfinity;
  }
};

template <int kThreadRows>
__device__ __forceinline__ void get_inverses(const RowState (&rows)[kThreadRows],
                                             float (&inverses)[kThreadRows]) {
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) inverses[r] = rows[r].inverse();
}

template <int kThreadRows, bool kInvariant>
struct OnlineSoftmax {
  float maximum[kThreadRows];      // in units of the scores
  float anchor[kThreadRows] = {};  // what exponents are relative to, in log2 units
  float sum[kThreadRows] = {};     // of this thread's columns only
  // Log2 of what a row's maximum may grow by before O is rescaled. In batch-invariant mode always
  // the same: sums begin anew with every leaf, and weighing them costs more than it saves.
  float slack_log2[kThreadRows];

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r)
      maximum[r] = kNegativeInfinity, slack_log2[r] = kInvariant ? 3.0f : 0.0f;
  }

  // Range would always allow the most; but a probability above 1 is no power of two and is rounded,
  // and where it is a large part of the sum that shows in the output as its own rounding does. So
  // in free mode only where it is less than half of what this thread's sum will be if it grows by
  // `sum_growth` until the request ends, an eighth or so of the row's.
  __device__ __forceinline__ void allow_growth(float sum_growth) {
    constexpr float kMost = 8.0f;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r)
      slack_log2[r] = fminf(fmaxf(ptx::log2_fast(sum[r] * (0.5f * sum_growth)), 0.0f), kMost);
  }

  // Takes in the maxima of a tile whose columns from `visible[row]` on are hidden. Returns whether
  // this warp's rows of O must be multiplied by `rescale`, which is set only then.
  __device__ __forceinline__ bool advance(float (&scores)[32], const int (&visible)[kThreadRows],
                                          float scale_log2, float (&rescale)[kThreadRows]) {
    if (visible[0] < 64 || visible[kThreadRows - 1] < 64) {
      // Against constants: 16 column numbers would take as many registers.
      int own[kThreadRows];
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) own[r] = visible[r] - 2 * (threadIdx.x % 4);
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int r = (i >> 1) & 1;
        if (r < kThreadRows && own[r] <= 8 * (i / 4) + (i & 1)) scores[i] = kNegativeInfinity;
      }
    }
    // Four running maxima a row, or the latency of one chain would be what this costs.
    float largest[kThreadRows][4];
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if (((i >> 1) & 1) >= kThreadRows) continue;
      float& x = largest[(i >> 1) & 1][(i & 1) + 2 * ((i >> 2) & 1)];
      x = i < 8 ? scores[i] : fmaxf(x, scores[i]);
    }
    bool grown = false;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      largest[r][0] =
          fmaxf(fmaxf(largest[r][0], largest[r][1]), fmaxf(largest[r][2], largest[r][3]));
      grown |= (largest[r][0] - maximum[r]) * scale_log2 > slack_log2[r];
    }
    if (!__any_sync(~0u, grown)) return false;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      const float next = fmaxf(maximum[r], quad_max(largest[r][0]));
      // A row that has seen no token keeps the anchor finite, so that exp2 gives 0 and not NaN.
      anchor[r] = next == kNegativeInfinity ? 0.0f : next * scale_log2;
      rescale[r] = ptx::exp2_fast(maximum[r] * scale_log2 - anchor[r]);
      maximum[r] = next;
      sum[r] *= rescale[r];
    }
    return true;
  }

  // Probabilities of the tile's columns 16 k .. 16 k + 15, packed as the A operand of one wgmma.
  template <typename Element>
  __device__ __forceinline__ void exponentiate(const float (&scores)[32], int k, float scale_log2,
                                               uint32_t (&probabilities)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = 8 * k + 2 * j, r = j & 1;
      if (r >= kThreadRows) {
        probabilities[j] = 0;
        continue;
      }
      const float low = ptx::exp2_fast(fmaf(scores[i], scale_log2, -anchor[r]));
      const float high = ptx::exp2_fast(fmaf(scores[i + 1], scale_log2, -anchor[r]));
      sum[r] += low + high;
      probabilities[j] = pack<Element>(low, high);
    }
  }

  // Sums of whole rows; after the last step.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (float& x : sum) x = quad_sum(x);
  }

  __device__ __forceinline__ void get_rows(RowState (&rows)[kThreadRows]) const {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) rows[r] = {anchor[r], sum[r]};
  }
};

}  // namespace flashmla
