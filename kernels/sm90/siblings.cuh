// Batch-invariant mode: the numbers of a node, the result of a leaf or of a subtree of leaves.
//
// A node is half of O as fp16 values in units of a power of two, not divided by the row's sum of
// exponentials, which is in the same unit. Siblings then weigh powers of two: merging them is
// packed arithmetic that rounds all but the tiniest values once. The root of an fp16 output is not
// rounded. All else that rounds is spelled out, so a node has one value wherever a request is cut.
//
// Nothing here that one thread cannot do by itself: tests/emulation compiles it for the host.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "sm90/decode_params.cuh"
#include "sm90/ptx/math.cuh"
#include "sm90/softmax.cuh"

namespace flashmla {

// Whether the root goes to the output unrounded: a bf16 output hardly shows whether it was rounded
// to fp16 before, an fp16 one does.
template <typename Element>
constexpr bool kUnroundedRoot = std::is_same_v<Element, __half>;

// What belongs to a row of a node: the unit is 2^exponent.
struct NodeState {
  float sum;  // 0: the row saw no token
  int exponent;

  __device__ __forceinline__ float inverse() const { return inverse_of(sum); }
  // Natural log of the sum of exponentials, -inf for a row that saw no token. The logarithm of the
  // unit is a whole number and added as such: the magnitude of O must not show.
  __device__ __forceinline__ float lse() const {
    const int bits = __float_as_int(sum);
    const float mantissa = __int_as_float((bits & 0x7fffff) | 0x3f800000);  // 1 .. 2
    const float whole = __int2float_rn((bits >> 23) - 127 + exponent);
    const float log = __fmul_rn(__fadd_rn(ptx::log2_fast(mantissa), whole), kLn2);
    return sum != 0.0f ? __fmaf_rn(sum, 0.0f, log) : kNegativeInfinity;  // NaN if the sum is
  }
};

// What brings a leaf's row to the unit of its node.
struct LeafScale {
  float up;
  NodeState state;

  // Exponentials are relative to `anchor`, in log2 units, and `sum` is theirs; `largest` is the
  // largest magnitude of the half row.
  __device__ __forceinline__ LeafScale(float anchor, float sum, float largest) {
    constexpr int kNoToken = -(1 << 30);  // below all others
    constexpr float kMostAnchor = 1 << 29;
    anchor = fminf(fmaxf(anchor, -kMostAnchor), kMostAnchor);  // a float knows no fraction there
    const float whole = floorf(anchor);
    const float fraction = ptx::exp2_fast(__fsub_rn(anchor, whole));
    // The largest value becomes 2^14 .. 2^15. Of 128: infinite, or not a number, as it then is.
    const int exponent = (__float_as_int(__fmul_rn(largest, fraction)) >> 23) - 127;
    const int shift = min(14 - exponent, 103);
    up = __fmul_rn(fraction, __int_as_float((shift + 127) << 23));
    state.sum = __fmul_rn(sum, up);
    state.exponent = sum != 0.0f ? static_cast<int>(whole) - shift : kNoToken;
  }
};

// What two siblings weigh in the node above them, and its state.
struct SiblingWeights {
  float first, second;
  NodeState state;

  SiblingWeights() = default;
  __device__ __forceinline__ SiblingWeights(const NodeState& x, const NodeState& y) {
    // Values of similar weight may add up to twice as much, which fp16 does not hold; others hardly
    // to more than the larger, and fp16 ends at twice what a leaf may have.
    constexpr int kSimilar = 10;
    const int distance = x.exponent - y.exponent;
    const bool similar = -kSimilar < distance && distance < kSimilar;
    state.exponent = max(x.exponent, y.exponent) + similar;
    const int x_shift = x.exponent - state.exponent, y_shift = y.exponent - state.exponent;
    first = power_of_two(x_shift);
    second = power_of_two(y_shift);
    state.sum = __fadd_rn(shifted(x.sum, x_shift), shifted(y.sum, y_shift));
  }

  // Two values of the node above from two of each sibling. With units 2^25 apart fp16 knows no
  // weight for the smaller one's, whose largest is then below 2^-24 of the larger one's largest.
  __device__ __forceinline__ uint32_t merge(uint32_t x, uint32_t y) const {
    return merge(x, y, __float2half2_rn(first), __float2half2_rn(second));
  }
  __device__ __forceinline__ static uint32_t merge(uint32_t x, uint32_t y, __half2 first,
                                                   __half2 second) {
    const __half2 merged = __hfma2(reinterpret_cast<const __half2&>(y), second,
                                   __hmul2_rn(reinterpret_cast<const __half2&>(x), first));
    return reinterpret_cast<const uint32_t&>(merged);
  }
  // The same of the root, the second sibling's unpacked.
  __device__ __forceinline__ float2 merge_root(uint32_t x, const float2& y) const {
    const float2 unpacked = unpack_halves(x);
    return {__fmaf_rn(unpacked.x, first, __fmul_rn(y.x, second)),
            __fmaf_rn(unpacked.y, first, __fmul_rn(y.y, second))};
  }

 private:
  // A sum in another unit. In two steps: a unit follows the largest value of O, so a sum that
  // counts may be in a tiny one.
  __device__ __forceinline__ static float shifted(float sum, int exponent) {
    const int clamped = max(exponent, -252), half = clamped / 2;
    return __fmul_rn(__fmul_rn(sum, power_of_two(half)), power_of_two(clamped - half));
  }
  // Of an exponent that is not positive; 0 where no normal float is so small.
  __device__ __forceinline__ static float power_of_two(int exponent) {
    return __int_as_float(max(exponent + 127, 0) << 23);
  }
};

// State of half a row of a piece, among the partial results.
__device__ __forceinline__ NodeState* piece_state(const DecodeArguments& a, int64_t partial,
                                                  int half) {
  return reinterpret_cast<NodeState*>(a.partial_lse) + (partial * kRowHalves + half);
}

}  // namespace flashmla
