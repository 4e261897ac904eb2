// Batch-invariant mode: merges the pieces of requests that were cut, which are subtrees, as the
// decode kernel merges those of one thread block.
#pragma once

#include "sm90/combine.cuh"
#include "sm90/leaves.cuh"
#include "sm90/siblings.cuh"

namespace flashmla {

// Half a row of a node; a lane holds one vector of it.
struct HalfRow {
  NodeState state;
  uint4 values;

  // The output's values, if this is the root.
  template <typename Element>
  __device__ __forceinline__ uint4 output() const {
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
    float out[kVectorColumns];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack_halves(words[i]);
      out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
    }
    return pack_vector<Element>(out, state.inverse());
  }
};

struct Siblings {
  HalfRow first, second;

  // The node above them.
  __device__ __forceinline__ HalfRow merge() const {
    const SiblingWeights weights(first.state, second.state);
    const uint4 &x = first.values, &y = second.values;
    return {weights.state, make_uint4(weights.merge(x.x, y.x), weights.merge(x.y, y.y),
                                      weights.merge(x.z, y.z), weights.merge(x.w, y.w))};
  }

  // The output's values, if that is the root, unrounded.
  template <typename Element>
  __device__ __forceinline__ uint4 unrounded_output() const {
    const SiblingWeights weights(first.state, second.state);
    const uint32_t x[4] = {first.values.x, first.values.y, first.values.z, first.values.w};
    const uint32_t y[4] = {second.values.x, second.values.y, second.values.z, second.values.w};
    float out[kVectorColumns];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = weights.merge_root(x[i], unpack_halves(y[i]));
      out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
    }
    return pack_vector<Element>(out, weights.state.inverse());
  }
};

// A node in shared memory: it waits for its sibling, or is for another warp.
struct SharedHalfRow {
  uint4 values[32];
  NodeState state;

  __device__ __forceinline__ void put(const HalfRow& node) {
    const int lane = threadIdx.x % 32;
    values[lane] = node.values;
    if (lane == 0) state = node.state;
  }
  __device__ __forceinline__ HalfRow get() const { return {state, values[threadIdx.x % 32]}; }
};

// The pieces of half a row, `stride` rows apart. A lane has vectors of 2^kInFlightLog2 on their
// way.
template <int kInFlightLog2>
struct Pieces {
  static constexpr int kInFlight = 1 << kInFlightLog2;
  static constexpr int kLevels = 7 - kInFlightLog2;  // of the tree above so many of them
  static_assert(kInFlight << kLevels == FLASHMLA_MAX_LEAVES);

  const uint4* out;
  const NodeState* states;
  int64_t stride;

  __device__ __forceinline__ HalfRow load(int i) const {
    const uint2 state = __ldcs(reinterpret_cast<const uint2*>(states + i * stride * kRowHalves));
    return {{__uint_as_float(state.x), static_cast<int>(state.y)},
            __ldcs(out + i * stride * (kLatent / kVectorColumns))};
  }

  // The node above `count` neighbours from `first` on, a power of two, and of which two it is made.
  // `waiting` is the warp's own; few have so many pieces that they need it.
  __device__ __forceinline__ HalfRow node_above(int first, int count, Siblings* made_of,
                                                SharedHalfRow (&waiting)[kLevels]) const {
    HalfRow node;
#pragma unroll 1
    for (int batch = 0;; ++batch) {
      HalfRow nodes[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (i < count) nodes[i] = load(first + batch * kInFlight + i);
      }
#pragma unroll
      for (int step = 1; step < kInFlight; step *= 2) {
#pragma unroll
        for (int i = 0; i + step < kInFlight; i += 2 * step) {
          if (i + step >= count) continue;
          const Siblings siblings{nodes[i], nodes[i + step]};
          if (i == 0) *made_of = siblings;
          nodes[i] = siblings.merge();
        }
      }
      node = nodes[0];
      // As in a thread block.
      const bool last = (batch + 1) * kInFlight >= count;
#pragma unroll 1
      for (uint32_t levels = merged_subtrees(batch, last); levels != 0; levels &= levels - 1) {
        *made_of = {waiting[__ffs(levels) - 1].get(), node};
        node = made_of->merge();
      }
      if (last) break;
      __syncwarp();  // all lanes have read what this replaces
      waiting[waiting_subtree(batch)].put(node);
      __syncwarp();
    }
    return node;
  }
};

template <typename Element, int kBlocksPerSm>
__global__ void __launch_bounds__(kCombineThreads, kBlocksPerSm)
    combine_leaves_kernel(const __grid_constant__ DecodeArguments a) {
  using Pieces = flashmla::Pieces<kBlocksPerSm == 1 ? 3 : 1>;
  __shared__ SharedHalfRow shared[kCombineWarps], waiting[kCombineWarps][Pieces::kLevels];
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  CutRequests requests(a);
  const int splits = __ldg(a.split_offsets + a.batch);
  if (splits == 0) return;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int cut = requests.count(), rows = a.all_rows.divisor, units = kRowHalves * cut * rows;
  // The pieces of half a row are shared among as many warps as there are, a power of two, each of
  // which has a subtree; but among no more than a cut request has pieces on average.
  const int warps = gridDim.x * kCombineWarps;
  const int group_log2 =
      min(kCombineWarpsLog2, min(log2_of_ratio(warps, units), log2_of_ratio(splits, cut)));
  const int group = 1 << group_log2;
  const bool discards = group <= 4;  // where few rows are many warps' work it takes too long
  const int member = warp & (group - 1), per_round = gridDim.x * kCombineWarps >> group_log2;
  for (int base = 0; base < units; base += per_round) {
    const int unit = base + (warp >> group_log2) * gridDim.x + blockIdx.x;
    const bool real = unit < units;
    const int half = unit % kRowHalves, row = a.all_rows.remainder(unit / kRowHalves);
    CutRequest request{};
    int active = 0;  // members with a subtree of the request
    HalfRow node;
    Siblings made_of;
    if (real) {
      request = requests(a.all_rows.divide(unit / kRowHalves));
      active = min(group, request.count);
      const int64_t source = static_cast<int64_t>(request.first) * rows + row;
      const Pieces pieces{reinterpret_cast<const uint4*>(a.partial_out) +
                              source * (kLatent / kVectorColumns) + 32 * half + lane,
                          piece_state(a, source, half), rows};
      const int count = request.count / active;
      if (member < active) {
        node = pieces.node_above(member * count, count, &made_of, waiting[warp]);
        if (discards) discard_half_rows(pieces.out, member * count, count, pieces.stride);
      }
    }
    for (int step = 1; step < group; step *= 2) {  // neighbours, then pairs of them
      if (member % (2 * step) == step) {
        shared[warp].put(node);
      }
      __syncthreads();
      if (member % (2 * step) != 0 || member + step >= active) continue;
      made_of = {node, shared[warp + step].get()};
      node = made_of.merge();
    }
    if (real && member == 0) {
      const uint4 out = kUnroundedRoot<Element> ? made_of.template unrounded_output<Element>()
                                                : node.template output<Element>();
      const int64_t target =
          output_row<false>(a, request.number, a.head_rows.divide(row), a.head_rows.remainder(row));
      reinterpret_cast<uint4*>(a.out)[target * (kLatent / kVectorColumns) + 32 * half + lane] =
          in_column_order(out);
      if (half == 0 && lane == 0) a.lse[target] = node.state.lse();
    }
    if (group > 1) __syncthreads();  // the next round writes what may still be read
  }
}

}  // namespace flashmla
