// Batch-invariant mode: a node in the registers of a warpgroup, from the accumulators of a leaf to
// memory.
#pragma once

#include "sm90/output.cuh"
#include "sm90/siblings.cuh"
#include "sm90/softmax.cuh"

namespace flashmla {

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
      const LeafScale scale(leaf[r].anchor, leaf[r].sum, largest_of_row(o, r));
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

// An item's node, its values as the accumulator had them, to the output or to the partial results.
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
