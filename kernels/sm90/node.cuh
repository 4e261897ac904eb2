// Batch-invariant mode: the result of a leaf, or of a subtree of leaves.
//
// A node is half of O as fp16 values in units of a power of two, not divided by the row's sum of
// exponentials, which is in the same unit. Siblings then weigh powers of two: merging them rounds
// each value once, and is packed arithmetic. Every leaf goes through fp16, be it alone, and every
// rounding is spelled out: a node has one value wherever a request is cut.
#pragma once

#include "sm90/output.cuh"
#include "sm90/softmax.cuh"

namespace flashmla {

// What belongs to a row of a node: the unit is 2^exponent.
struct NodeState {
  float sum;  // 0: the row saw no token
  int exponent;

  __device__ __forceinline__ float inverse() const {
    return sum != 0.0f ? reciprocal_fast(sum) : 0.0f;
  }
  // Natural log of the sum of exponentials, -inf for a row that saw no token.
  __device__ __forceinline__ float lse() const {
    constexpr float kLn2 = 0.6931471805599453f;
    return sum != 0.0f ? __fmul_rn(__fadd_rn(log2_fast(sum), __int2float_rn(exponent)), kLn2)
                       : kNegativeInfinity;
  }
};

// 2^exponent for one that is not positive; 0 where no normal float is so small.
__device__ __forceinline__ float power_of_two(int exponent) {
  return __int_as_float(max(exponent + 127, 0) << 23);
}

// What brings a leaf's row to the unit of its node. The largest of its values becomes 2^6 .. 2^8:
// each of log2(FLASHMLA_MAX_LEAVES) merges may double it, and fp16 ends at 2^16.
struct LeafScale {
  static_assert(FLASHMLA_MAX_LEAVES <= 1 << 7);
  float up;
  NodeState state;

  __device__ __forceinline__ LeafScale(const RowState& row, float largest) {
    constexpr int kNoToken = -(1 << 30);  // below all others
    constexpr float kMostAnchor = 1 << 29;
    const float whole = floorf(fminf(fmaxf(row.anchor, -kMostAnchor), kMostAnchor));
    // Of 255: infinite, or not a number, as the result then is.
    const int exponent = (__float_as_int(largest) >> 23) - 127, shift = min(6 - exponent, 103);
    up = __fmul_rn(exp2_fast(__fsub_rn(row.anchor, whole)), __int_as_float((shift + 127) << 23));
    state.sum = __fmul_rn(row.sum, up);
    state.exponent = row.sum != 0.0f ? static_cast<int>(whole) - shift : kNoToken;
  }
};

// What two siblings weigh in the node above them, and its state.
struct SiblingWeights {
  __half2 first, second;
  NodeState state;

  __device__ __forceinline__ SiblingWeights(const NodeState& x, const NodeState& y) {
    state.exponent = max(x.exponent, y.exponent);
    const float x_weight = power_of_two(x.exponent - state.exponent);
    const float y_weight = power_of_two(y.exponent - state.exponent);
    state.sum = __fmaf_rn(y.sum, y_weight, __fmul_rn(x.sum, x_weight));
    first = __float2half2_rn(x_weight);
    second = __float2half2_rn(y_weight);
  }

  // Two values of the node above from two of each sibling.
  __device__ __forceinline__ uint32_t merge(uint32_t x, uint32_t y) const {
    const __half2 merged = __hfma2(reinterpret_cast<const __half2&>(y), second,
                                   __hmul2_rn(reinterpret_cast<const __half2&>(x), first));
    return reinterpret_cast<const uint32_t&>(merged);
  }
};

// Half of O of this thread's two rows; words alternate between them.
struct Node {
  uint32_t words[64];
  NodeState rows[2];

  // Of a leaf. A row that saw no token gets nothing from it, NaN neither.
  __device__ __forceinline__ Node(const RowState (&leaf)[2], float (&o)[128]) {
    if (__any_sync(~0u, leaf[0].sum == 0.0f || leaf[1].sum == 0.0f)) {
#pragma unroll
      for (int i = 0; i < 128; ++i) o[i] = leaf[(i >> 1) & 1].sum == 0.0f ? 0.0f : o[i];
    }
    float up[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const LeafScale scale(leaf[r], largest_of_row(o, r));
      up[r] = scale.up, rows[r] = scale.state;
    }
#pragma unroll
    for (int i = 0; i < 64; ++i)
      words[i] = pack<__half>(o[2 * i] * up[i & 1], o[2 * i + 1] * up[i & 1]);
  }

  // Its values as the accumulator had them, in its unit.
  __device__ __forceinline__ void unpack(float (&o)[128]) const {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[i]));
      o[2 * i] = pair.x, o[2 * i + 1] = pair.y;
    }
  }
};

// State of half a row of a piece, among the partial results.
__device__ __forceinline__ NodeState* piece_state(const DecodeArguments& a, int64_t partial,
                                                  int half) {
  return reinterpret_cast<NodeState*>(a.partial_lse) + (partial * kRowHalves + half);
}

// The values of an item's node, unpacked, to the output or to the partial results.
template <typename Element>
__device__ __forceinline__ void store_node(const DecodeArguments& a, const Item& item, int kv_head,
                                           int row_begin, int half, const float (&o)[128],
                                           const NodeState (&rows)[2]) {
  const int column = half * (kLatent / 2);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = min(row_begin + accumulator_row(r), a.rows - 1);
    const bool valid = row_begin + accumulator_row(r) < a.rows;
    const bool speaks = valid && threadIdx.x % 4 == 0;  // for its row
    if (item.split < 0) {
      const int64_t target = output_row<false>(a, item.request, kv_head, row);
      store_row<Element, true>(static_cast<Element*>(a.out) + target * kLatent + column, valid, r,
                               o, rows[r].inverse());
      if (speaks && half == 0) a.lse[target] = rows[r].lse();
    } else {
      const int64_t partial = partial_row(a, item.split, kv_head, row);
      store_row<__half, false>(a.partial_out + partial * kLatent + column, valid, r, o, 1.0f);
      if (speaks) *piece_state(a, partial, half) = rows[r];
    }
  }
}

}  // namespace flashmla
