// Batch-invariant mode: merges the subtrees of requests that were cut, as the decode kernel does.
#pragma once

#include "sm90/bounds.cuh"
#include "sm90/combine.cuh"
#include "sm90/tree.cuh"

namespace flashmla {

// A subtree's result; a lane holds one vector of a row.
struct Node {
  float lse;
  float4 out;

  __device__ __forceinline__ void join_with(const Node& second) {
    const Siblings s = join(lse, second.lse);
    lse = s.lse;
    out = make_float4(merge(s, out.x, second.out.x), merge(s, out.y, second.out.y),
                      merge(s, out.z, second.out.z), merge(s, out.w, second.out.w));
  }
};

// The tree over `count` subtrees of a row, a power of two, that lie `stride` rows apart: leaves, or
// groups of them and more.
__device__ __forceinline__ Node merge_tree(const float4* partial_out, const float* partial_lse,
                                           int64_t stride, int count, bool leaves) {
  constexpr int kBatch = kVectorsInFlight;
  constexpr int kBatches = FLASHMLA_MAX_LEAVES / kBatch;
  Node waiting[4] = {};  // for a sibling of 1, 2, 4 batches
  static_assert(1 << 3 == kBatches, "heights above a batch");
  for (int number = 0;; ++number) {
    Node node[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      node[i] = {kNegativeInfinity, {}};
      if (i < count) {
        node[i].lse = __ldcs(partial_lse);
        node[i].out = __ldcs(partial_out);
      }
      partial_lse += stride;
      partial_out += stride * (kLatent / 4);
    }
    if (leaves) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (i % kGroupLeaves > 0 && i < count) node[i - i % kGroupLeaves].join_with(node[i]);
      }
    }
#pragma unroll
    for (int step = 1; step < kBatch; step *= 2) {
      if (leaves && step < kGroupLeaves) continue;
      if (step >= count) break;
#pragma unroll
      for (int i = 0; i < kBatch; i += 2 * step) node[i].join_with(node[i + step]);
    }
    Node done = node[0];
    int height = 0;
#pragma unroll
    for (int h = 0; h < 3; ++h) {
      if (height == h && number >> h & 1) {
        const Node second = done;
        done = waiting[h];
        done.join_with(second);
        ++height;
      }
    }
    if ((number + 1) * kBatch >= count) return done;
#pragma unroll
    for (int h = 0; h < 3; ++h) {
      if (height == h) waiting[h] = done;
    }
  }
}

struct CombineTreeShared {
  float4 out[kCombineWarps][32];
  float lse[kCombineWarps];
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
  // As many warps to a row as there are, but no more than it has subtrees: they share the tree.
  int group = 1;
  while (group < kCombineWarps &&
         2 * units * group <= static_cast<int>(gridDim.x) * kCombineWarps &&
         2 * group * cut <= splits)
    group *= 2;
  const int member = warp % group, per_round = gridDim.x * (kCombineWarps / group);
  for (int base = 0; base < units; base += per_round) {
    const int unit = base + warp / group * gridDim.x + blockIdx.x;
    const bool real = unit < units;
    const int chunk = unit % kRowVectors, row = unit / kRowVectors % rows;
    int request = 0, members = 1;
    Node node{kNegativeInfinity, {}};
    if (real) {
      request = unit / kRowVectors / rows;
      if (cut < a.batch) request = requests.find(request);
      const int first = __ldg(a.split_offsets + request),
                count = __ldg(a.split_offsets + request + 1) - first;
      // Its pieces are leaves, or whole groups of them.
      const int length = request_length(a, request);
      const bool leaves = count == leaf_count(tiles_of(length), a.max_leaves);
      members = min(group, leaves ? max(1, count / kGroupLeaves) : count);
      if (member < members) {
        const int own = count / members;
        const int64_t source = static_cast<int64_t>(first + member * own) * rows + row;
        node = merge_tree(
            reinterpret_cast<const float4*>(a.partial_out + source * kLatent) + 32 * chunk + lane,
            a.partial_lse + source, rows, own, leaves);
      }
    }
    if (group > 1) {
      shared.out[warp][lane] = node.out;
      if (lane == 0) shared.lse[warp] = node.lse;
      __syncthreads();
      if (member == 0) {
        Node all[kCombineWarps];
#pragma unroll
        for (int i = 0; i < kCombineWarps; ++i) {
          all[i] = {kNegativeInfinity, {}};
          if (i < members) all[i] = {shared.lse[warp + i], shared.out[warp + i][lane]};
        }
#pragma unroll
        for (int step = 1; step < kCombineWarps; step *= 2) {
          if (step >= members) break;
#pragma unroll
          for (int i = 0; i < kCombineWarps; i += 2 * step) all[i].join_with(all[i + step]);
        }
        node = all[0];
      }
      __syncthreads();
    }
    if (real && member == 0) {
      const int64_t target = output_row(a, request, row / a.rows, row % a.rows);
      auto* out = static_cast<Element*>(a.out) + target * kLatent + 128 * chunk;
      reinterpret_cast<uint2*>(out)[lane] =
          make_uint2(pack<Element>(node.out.x, node.out.y), pack<Element>(node.out.z, node.out.w));
      if (chunk == 0 && lane == 0) a.lse[target] = node.lse;
    }
  }
}

}  // namespace flashmla
