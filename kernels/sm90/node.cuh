// Batch-invariant mode: a node in the registers of a warpgroup, from the accumulators of a leaf to
// memory.
#pragma once

#include "sm90/output.cuh"
#include "sm90/siblings.cuh"
#include "sm90/softmax.cuh"

namespace flashmla {

// Half of O of this thread's rows, one after the other, as pairs of columns.
template <int kThreadRows>
struct Node {
  uint32_t words[32 * kThreadRows];
  NodeState rows[kThreadRows];

  __device__ __forceinline__ uint4 vector(int i) const {
    return make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
  }

  // Of a leaf. A row that saw no token gets nothing from it, NaN neither.
  __device__ __forceinline__ Node(const RowState (&leaf)[kThreadRows], float (&o)[128]) {
    if (__any_sync(~0u, leaf[0].sum == 0.0f || leaf[kThreadRows - 1].sum == 0.0f)) {
#pragma unroll
      for (int i = 0; i < 128; ++i) {
        const int r = (i >> 1) & 1;
        if (r < kThreadRows && leaf[r].sum == 0.0f) o[i] = 0.0f;
      }
    }
    float up[kThreadRows];
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      const LeafScale scale(leaf[r].anchor, leaf[r].sum, largest_of_row(o, r));
      up[r] = scale.up, rows[r] = scale.state;
    }
#pragma unroll
    for (int i = 0; i < 32 * kThreadRows; ++i) {
      const float* const pair = o + accumulator_pair(i);
      words[i] = pack<__half>(pair[0] * up[i / 32], pair[1] * up[i / 32]);
    }
  }

  // Where the accumulator has the pair of a word.
  __device__ __forceinline__ static constexpr int accumulator_pair(int word) {
    return 4 * (word % 32) + 2 * (word / 32);
  }

  // Its values as the accumulator had them, in its unit.
  __device__ __forceinline__ void unpack(float (&o)[128]) const {
    if constexpr (kThreadRows == 1) {  // or second rows would keep theirs
#pragma unroll
      for (int i = 0; i < 64; ++i) ptx::forget_register(o[accumulator_pair(32 + i / 2) + i % 2]);
    }
#pragma unroll
    for (int i = 0; i < 32 * kThreadRows; ++i) {
      const float2 pair = unpack_halves(words[i]);
      o[accumulator_pair(i)] = pair.x, o[accumulator_pair(i) + 1] = pair.y;
    }
  }
};

// A whole request's node, its values as the accumulator had them, to the output.
template <typename Element, int kThreadRows>
__device__ __forceinline__ void store_root(const DecodeArguments& a, const Item& item, int kv_head,
                                           int row_begin, int half, const float (&o)[128],
                                           const NodeState (&rows)[kThreadRows]) {
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    const int row = min(row_begin + accumulator_row<kThreadRows>(r), a.rows - 1);
    const bool valid = row_begin + accumulator_row<kThreadRows>(r) < a.rows;
    const int64_t target = output_row<false>(a, item.request, kv_head, row);
    store_row<Element, true>(static_cast<Element*>(a.out) + target * kLatent + half * (kLatent / 2),
                             valid, r, o, rows[r].inverse());
    if (valid && half == 0 && threadIdx.x % 4 == 0) a.lse[target] = rows[r].lse();
  }
}

// The node of a piece of a request to the partial results, vectors as store_row lays them out.
template <int kThreadRows>
__device__ __forceinline__ void store_piece(const DecodeArguments& a, const Item& item, int kv_head,
                                            int row_begin, int half,
                                            const Node<kThreadRows>& node) {
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    const int row = min(row_begin + accumulator_row<kThreadRows>(r), a.rows - 1);
    const bool valid = row_begin + accumulator_row<kThreadRows>(r) < a.rows;
    const int64_t partial = partial_row(a, item.split, kv_head, row);
    auto* const out =
        reinterpret_cast<uint4*>(a.partial_out + partial * kLatent) + 32 * half + threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (valid) out[4 * i] = node.vector(8 * r + i);
    }
    if (valid && threadIdx.x % 4 == 0) *piece_state(a, partial, half) = node.rows[r];
  }
}

}  // namespace flashmla
