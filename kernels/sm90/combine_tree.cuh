// Batch-invariant mode: merges the subtrees of requests that were cut, as the decode kernel does.
#pragma once

#include "sm90/combine.cuh"
#include "sm90/tree.cuh"

namespace flashmla {

// A subtree's result; a lane holds one vector of a row.
struct Node {
  RowState state;
  float4 out;

  __device__ __forceinline__ void add(const Node& second) {
    const Addition row(state, second.state);
    state = row.state;
    out = make_float4(row.sum(out.x, second.out.x), row.sum(out.y, second.out.y),
                      row.sum(out.z, second.out.z), row.sum(out.w, second.out.w));
  }
};

// Partial results of one row, `stride` rows apart.
struct Partials {
  const float4* out;
  const RowState* states;
  int64_t stride;

  __device__ __forceinline__ Node load(int i) const {
    const Node node{states[i * stride], __ldcs(out + i * stride * (kLatent / 4))};
    return node.state.sum == 0.0f ? Node{node.state, {}} : node;
  }
};

// The sum of the first `count` nodes, a power of two, pairwise.
template <int kMost>
__device__ __forceinline__ void add_pairwise(Node (&node)[kMost], int count) {
#pragma unroll
  for (int step = 1; step < kMost; step *= 2) {
    if (step >= count) break;
#pragma unroll
    for (int i = 0; i < kMost; i += 2 * step) node[i].add(node[i + step]);
  }
}

// The sum of `groups` groups of `leaves` partial results each.
__device__ __forceinline__ Node add_groups(const Partials& partials, int groups, int leaves) {
  constexpr int kBatch = kVectorsInFlight / 2;
  Node group[kMaxGroups] = {};
#pragma unroll
  for (int g = 0; g < kMaxGroups; ++g) {
    if (g < groups) group[g] = partials.load(g * leaves);
  }
#pragma unroll
  for (int g = 0; g < kMaxGroups; ++g) {
    if (g >= groups) break;
#pragma unroll 1
    for (int begin = 1; begin < leaves; begin += kBatch) {
      Node next[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (begin + i < leaves) next[i] = partials.load(g * leaves + begin + i);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (begin + i < leaves) group[g].add(next[i]);
      }
    }
  }
  add_pairwise(group, groups);
  return group[0];
}

struct CombineTreeShared {
  float4 out[kCombineWarps][32];
  RowState state[kCombineWarps];
};

template <typename Element>
__global__ void __launch_bounds__(kCombineThreads, kCombineBlocksPerSm)
    combine_tree_kernel(const __grid_constant__ DecodeArguments a) {
  __shared__ CombineTreeShared shared;
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  const int splits = __ldg(a.split_offsets + a.batch);
  if (splits == 0) return;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const CutRequests requests{a.split_offsets, a.batch};
  const int cut = requests.count(), rows = a.h_kv * a.rows, units = cut * rows * kRowVectors;
  // As many warps to a row as there are, but no more than it has groups: they share them.
  const int most_groups = max_groups(a.max_leaves);
  int group = 1;
  while (group < most_groups && 2 * units * group <= static_cast<int>(gridDim.x) * kCombineWarps)
    group *= 2;
  const int member = warp % group, per_round = gridDim.x * (kCombineWarps / group);
  for (int base = 0; base < units; base += per_round) {
    const int unit = base + warp / group * gridDim.x + blockIdx.x;
    const bool real = unit < units;
    const int chunk = unit % kRowVectors, row = unit / kRowVectors % rows;
    int request = 0, members = 1;
    Node node{};
    if (real) {
      request = unit / kRowVectors / rows;
      if (cut < a.batch) request = requests.find(request);
      const int first = __ldg(a.split_offsets + request),
                count = __ldg(a.split_offsets + request + 1) - first;
      // Its pieces are leaves, or groups and more.
      const int groups = min(count, most_groups);
      members = min(group, groups);
      if (member < members) {
        const int own = count / members;
        const int64_t source = static_cast<int64_t>(first + member * own) * rows + row;
        const Partials partials{
            reinterpret_cast<const float4*>(a.partial_out + source * kLatent) + 32 * chunk + lane,
            reinterpret_cast<const RowState*>(a.partial_lse) + source, rows};
        node = add_groups(partials, groups / members, count / groups);
      }
    }
    if (group > 1) {
      shared.out[warp][lane] = node.out;
      if (lane == 0) shared.state[warp] = node.state;
      __syncthreads();
      if (member == 0) {
        Node all[kMaxGroups] = {};
#pragma unroll
        for (int i = 0; i < kMaxGroups; ++i) {
          if (i < members) all[i] = {shared.state[warp + i], shared.out[warp + i][lane]};
        }
        add_pairwise(all, members);
        node = all[0];
      }
      __syncthreads();
    }
    if (real && member == 0) {
      const int64_t target = output_row(a, request, row / a.rows, row % a.rows);
      auto* out = static_cast<Element*>(a.out) + target * kLatent + 128 * chunk;
      const float inverse = node.state.inverse();
      reinterpret_cast<uint2*>(out)[lane] =
          make_uint2(pack<Element>(node.out.x * inverse, node.out.y * inverse),
                     pack<Element>(node.out.z * inverse, node.out.w * inverse));
      if (chunk == 0 && lane == 0) a.lse[target] = node.state.lse();
    }
  }
}

}  // namespace flashmla
