// Batch-invariant mode: merges the pieces of requests that were cut, which are subtrees, as the
// decode kernel merges those of one thread block.
#pragma once

#include "sm90/combine.cuh"
#include "sm90/leaves.cuh"
#include "sm90/siblings.cuh"

namespace flashmla {

// A slice of a row of a node; a lane holds one vector of it, all lanes the state.
template <int kWords>
struct SliceNode {
  NodeState state;
  uint32_t words[kWords];

  // The output's values, if this is the root.
  template <typename Element>
  __device__ __forceinline__ void get_output(uint32_t (&pairs)[kWords]) const {
    const float inverse = state.inverse();
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const float2 pair = unpack_halves(words[i]);
      pairs[i] = pack<Element>(pair.x * inverse, pair.y * inverse);
    }
  }
};

// What a node was made of last.
template <int kWords>
struct Siblings {
  SiblingWeights weights;
  uint32_t first[kWords], second[kWords];

  __device__ __forceinline__ SliceNode<kWords> merge() const {
    SliceNode<kWords> node{weights.state, {}};
#pragma unroll
    for (int i = 0; i < kWords; ++i) node.words[i] = weights.merge(first[i], second[i]);
    return node;
  }

  // The output's values, if that is the root, unrounded.
  template <typename Element>
  __device__ __forceinline__ void get_unrounded_output(uint32_t (&pairs)[kWords]) const {
    const float inverse = weights.state.inverse();
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const float2 pair = weights.merge_root(first[i], unpack_halves(second[i]));
      pairs[i] = pack<Element>(pair.x * inverse, pair.y * inverse);
    }
  }
};

// A node in shared memory: it waits for its sibling, or is for another warp.
template <int kWords>
struct SharedNode {
  Vector<kWords> values[32];
  NodeState state;

  __device__ __forceinline__ void put(const SliceNode<kWords>& node) {
    const int lane = threadIdx.x % 32;
    put_words<kWords>(node.words, values[lane]);
    if (lane == 0) state = node.state;
  }
  __device__ __forceinline__ SliceNode<kWords> get() const {
    SliceNode<kWords> node{state, {}};
    get_words<kWords>(values[threadIdx.x % 32], node.words);
    return node;
  }
};

// Merges neighbours, a power of two, by one warp that has 2^kInFlightLog2 of them on their way.
template <int kWords, int kInFlightLog2>
class Tree {
 public:
  static constexpr int kInFlight = 1 << kInFlightLog2;
  static constexpr int kLevels = 7 - kInFlightLog2;  // above so many nodes
  static_assert(kInFlight << kLevels == FLASHMLA_MAX_LEAVES);
  using Waiting = SharedNode<kWords>[kLevels];

  // `waiting`: the warp's own. Few trees need it.
  __device__ __forceinline__ explicit Tree(Waiting& waiting) : waiting_(waiting) {}

  // The root above `count` nodes, and of which two it is made if they are more than one.
  // load(vectors, begin) gets the vectors of nodes `begin` and further, as far as they exist; and
  // returns for each lane the state of node begin + lane.
  template <typename Load>
  __device__ __forceinline__ SliceNode<kWords> merge(int count, Siblings<kWords>& made_of,
                                                     const Load& load) {
#pragma unroll 1
    for (int batch = 0;; ++batch) {
      SliceNode<kWords> node = merge_batch(batch * kInFlight, count, made_of, load);
      // As in a thread block.
      const bool last = (batch + 1) * kInFlight >= count;
#pragma unroll 1
      for (uint32_t levels = merged_subtrees(batch, last); levels != 0; levels &= levels - 1) {
        const SliceNode<kWords> sibling = waiting_[__ffs(levels) - 1].get();
        made_of.weights = {sibling.state, node.state};
#pragma unroll
        for (int i = 0; i < kWords; ++i)
          made_of.first[i] = sibling.words[i], made_of.second[i] = node.words[i];
        node = made_of.merge();
      }
      if (last) return node;
      __syncwarp();  // all lanes have read what this replaces
      waiting_[waiting_subtree(batch)].put(node);
      __syncwarp();
    }
  }

 private:
  // Each lane weighs two siblings, for all.
  template <typename Load>
  __device__ __forceinline__ static SliceNode<kWords> merge_batch(int begin, int count,
                                                                  Siblings<kWords>& made_of,
                                                                  const Load& load) {
    Vector<kWords> vectors[kInFlight];
    NodeState state = load(vectors, begin);
    SiblingWeights weights{};
    uint32_t nodes[kInFlight][kWords];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) get_words<kWords>(vectors[i], nodes[i]);
#pragma unroll
    for (int step = 1; step < kInFlight; step *= 2) {
      if (step >= count) break;
      const NodeState sibling{__shfl_down_sync(~0u, state.sum, step),
                              __shfl_down_sync(~0u, state.exponent, step)};
      weights = {state, sibling};
      state = weights.state;
#pragma unroll
      for (int j = 0; j < kWords; ++j)
        made_of.first[j] = nodes[0][j], made_of.second[j] = nodes[step][j];
      const uint32_t packed = pack<__half>(weights.first, weights.second);
#pragma unroll
      for (int i = 0; i < kInFlight; i += 2 * step) {
        const uint32_t own = __shfl_sync(~0u, packed, i);
        const __half2 first = __low2half2(reinterpret_cast<const __half2&>(own));
        const __half2 second = __high2half2(reinterpret_cast<const __half2&>(own));
#pragma unroll
        for (int j = 0; j < kWords; ++j)
          nodes[i][j] = SiblingWeights::merge(nodes[i][j], nodes[i + step][j], first, second);
      }
    }
    SliceNode<kWords> node;
    node.state = {__shfl_sync(~0u, state.sum, 0), __shfl_sync(~0u, state.exponent, 0)};
    made_of.weights.first = __shfl_sync(~0u, weights.first, 0);
    made_of.weights.second = __shfl_sync(~0u, weights.second, 0);
    made_of.weights.state = node.state;
#pragma unroll
    for (int j = 0; j < kWords; ++j) node.words[j] = nodes[0][j];
    return node;
  }

  Waiting& waiting_;
};

template <typename Element, int kWords, int kBlocksPerSm>
__global__ void __launch_bounds__(kCombineThreads, kBlocksPerSm)
    combine_leaves_kernel(const __grid_constant__ DecodeArguments a) {
  using Slices = flashmla::Slices<kWords>;
  constexpr int kInFlightLog2 = kWords != 4 ? 4 : kBlocksPerSm == 1 ? 3 : 1;
  using Tree = flashmla::Tree<kWords, kInFlightLog2>;
  constexpr bool kDiscards = kWords > 1;  // of few rows it would take longer than it saves
  __shared__ SharedNode<kWords> shared[kCombineWarps], waiting[kCombineWarps][Tree::kLevels];
  ptx::let_next_kernel_start();
  fetch_arguments(a);
  // What the decode kernel had waited for before it let this one start need not be waited for
  // again.
  CutRequests requests(a);
  const auto [units, group_log2, blocks] =
      Shares::of<kWords, Tree::kInFlight>(a, requests, __ldg(a.split_offsets + a.batch));
  if (blockIdx.x >= blocks) return ptx::wait_for_previous_kernel();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = a.all_rows.divisor;
  const int group = 1 << group_log2, member = warp & (group - 1);  // each has a subtree
  Tree tree(waiting[warp]);
  for (uint32_t base = 0; base < units; base += blocks * (kCombineWarps >> group_log2)) {
    const uint32_t unit = base + (warp >> group_log2) * blocks + blockIdx.x;
    const bool real = unit < units;
    const int slice = unit % Slices::kCount, all_row = unit / Slices::kCount;
    const int row = a.all_rows.remainder(all_row);
    CutRequest request{};
    if (real) request = requests(a.all_rows.divide(all_row));
    const int active = min(group, request.count);  // members with a subtree of the request
    ptx::wait_for_previous_kernel();
    SliceNode<kWords> node;
    Siblings<kWords> made_of;
    if (member < active) {
      const int count = request.count / active;
      const int64_t first = static_cast<int64_t>(request.first + member * count) * rows + row;
      const Slices slices(a, first, rows, slice);
      const NodeState* const states = piece_state(a, first, Slices::half_of(slice));
      node = tree.merge(count, made_of, [&](Vector<kWords>(&x)[Tree::kInFlight], int begin) {
        uint2 state{};
        if (begin + lane < count)
          state = __ldcs(
              reinterpret_cast<const uint2*>(states + int64_t{begin + lane} * rows * kRowHalves));
        slices.load(x, begin, count);
        return NodeState{__uint_as_float(state.x), static_cast<int>(state.y)};
      });
      if (kDiscards) slices.discard(0, count);
      if (group > 1) shared[warp].put(node);
    }
    if (group > 1) {  // once: where warps share there are enough for all
      __syncthreads();
      if (member > 0) return;
      const SharedNode<kWords>* const nodes = shared + warp;
      node = tree.merge(active, made_of, [&](Vector<kWords>(&x)[Tree::kInFlight], int begin) {
#pragma unroll
        for (int i = 0; i < Tree::kInFlight; ++i)
          x[i] = begin + i < active ? nodes[begin + i].values[lane] : Vector<kWords>{};
        return begin + lane < active ? nodes[begin + lane].state : NodeState{};
      });
    }
    if (!real) continue;
    uint32_t pairs[kWords];
    if constexpr (kUnroundedRoot<Element>) {
      made_of.template get_unrounded_output<Element>(pairs);
    } else {
      node.template get_output<Element>(pairs);
    }
    const int64_t target =
        output_row<false>(a, request.number, a.head_rows.divide(row), a.head_rows.remainder(row));
    SliceOutput<kWords>(a.out, target, slice, false).store(pairs);
    if (slice == 0 && lane == 0) a.lse[target] = node.state.lse();
  }
}

}  // namespace flashmla
