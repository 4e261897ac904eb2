// What the decode kernel computes from fresh accumulators, and in batch-invariant mode what becomes
// of it.
#pragma once

#include "sm90/leaves.cuh"
#include "sm90/node.cuh"
#include "sm90/ptx/wgmma.cuh"
#include "sm90/rooms.cuh"

namespace flashmla {

// Pages that are computed from fresh accumulators: a leaf, or in free mode the whole item.
template <bool kInvariant>
struct Span {
  int end;
  bool fresh = true;

  __device__ __forceinline__ Span(const DecodeArguments&, const Item& item, int)
      : end(item.page_end) {}
};

template <>
struct Span<true> {
  int end;
  bool fresh;
  LeafCursor cursor;

  __device__ __forceinline__ Span(const DecodeArguments& a, const Item& item, int length)
      : cursor(planned_pages(item, length), item.page_begin, a.max_leaves) {
    start(item, length);
  }
  __device__ __forceinline__ void advance(const Item& item, int length) {
    cursor.advance();
    start(item, length);
  }

 private:
  __device__ __forceinline__ void start(const Item& item, int length) {
    fresh = true;
    end = min(item.page_end, cursor.end(planned_pages(item, length)));
  }
  // A plan older than its lengths may ask for pages that the request no longer has.
  __device__ __forceinline__ static int planned_pages(const Item& item, int length) {
    return max(pages_of(length), item.page_end);
  }
};

// A leaf takes up what waits for it, then waits itself.
template <int kThreadRows>
__device__ __forceinline__ void end_leaf(const DecodeArguments& a, const Item& item, int length,
                                         int row_begin, int half,
                                         const RowState (&leaf)[kThreadRows], Span<true>& span,
                                         float (&o)[128]) {
  Node<kThreadRows> node(leaf, o);
  const Rooms<kThreadRows> rooms(a, row_begin);
  const int number = span.cursor.leaf();
  rooms.merge(merged_subtrees(number, false), half, node);
  rooms.store(waiting_subtree(number), half, node);
  span.advance(item, length);
  ptx::forget_registers(o);  // the next leaf's first product replaces them
}

// The last leaf takes up all that wait, and is stored.
template <typename Element, int kThreadRows>
__device__ __forceinline__ void end_item(const DecodeArguments& a, const Item& item, int kv_head,
                                         int row_begin, int half,
                                         const RowState (&leaf)[kThreadRows],
                                         const Span<true>& span, float (&o)[128]) {
  Node<kThreadRows> node(leaf, o);
  const Rooms<kThreadRows> rooms(a, row_begin);
  const uint32_t waiting = merged_subtrees(span.cursor.leaf(), true);
  // The highest of a whole request is what the root takes up.
  const bool unrounded = kUnroundedRoot<Element> && item.split < 0 && waiting != 0;
  const int root = unrounded ? 31 - __clz(waiting) : -1;
  rooms.merge(unrounded ? waiting ^ 1u << root : waiting, half, node);
  if (item.split >= 0) {
    store_piece(a, item, kv_head, row_begin, half, node);
    ptx::forget_registers(o);
    return;
  }
  node.unpack(o);
  if (unrounded) rooms.merge_root(root, half, node.rows, o);
  store_root<Element>(a, item, kv_head, row_begin, half, o, node.rows);
}

}  // namespace flashmla
