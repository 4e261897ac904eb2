// Batch-invariant mode: adds up the pieces of requests that were cut, as the decode kernel does.
#pragma once

#include "sm90/combine.cuh"
#include "sm90/rooms.cuh"

namespace flashmla {

constexpr int kLeafRowVectors = kLatent / 128;  // 16-byte vectors of fp32 that a row is to a lane
constexpr int kLeavesInFlight = 8;

// A result; a lane holds one vector of a row.
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

  // After the whole warp has read it.
  __device__ __forceinline__ void discard(int i) const {
    if (threadIdx.x % 8 == 0) ptx::discard_line(out + i * stride * (kLatent / 4));
  }
};

// The sum of `count` partial results from `first` on, from left to right.
__device__ __forceinline__ Node add_up(const Partials& partials, int first, int count,
                                       bool discards) {
  constexpr int kBatch = kLeavesInFlight;
  Node sum = partials.load(first);
#pragma unroll 1
  for (int begin = 1; begin < count; begin += kBatch) {
    Node next[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (begin + i < count) next[i] = partials.load(first + begin + i);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (begin + i < count) sum.add(next[i]);
    }
  }
  if (discards) {
    __syncwarp();
    for (int i = first; i < first + count; ++i) partials.discard(i);
  }
  return sum;
}

struct CombineLeavesShared {
  float4 out[kCombineWarps][32];
  RowState state[kCombineWarps];
};

template <typename Element>
__global__ void __launch_bounds__(kCombineThreads, kCombineBlocksPerSm)
    combine_leaves_kernel(const __grid_constant__ DecodeArguments a) {
  __shared__ CombineLeavesShared shared;
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  const int splits = __ldg(a.split_offsets + a.batch);
  if (splits == 0) return;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const CutRequests requests{a.split_offsets, a.batch};
  const int cut = requests.count(), rows = a.h_kv * a.rows, units = cut * rows * kLeafRowVectors;
  // A warp for each half of a row, where there are as many.
  const int group = 2 * units <= static_cast<int>(gridDim.x) * kCombineWarps ? 2 : 1;
  const int member = warp % group, per_round = gridDim.x * (kCombineWarps / group);
  for (int base = 0; base < units; base += per_round) {
    const int unit = base + warp / group * gridDim.x + blockIdx.x;
    const bool real = unit < units;
    const int chunk = unit % kLeafRowVectors, row = unit / kLeafRowVectors % rows;
    CutRequest request{};
    Node node{};
    if (real) {
      request = requests(unit / kLeafRowVectors / rows, cut);
      // Its pieces are halves, or the leaves of both.
      const int64_t source = static_cast<int64_t>(request.first) * rows + row;
      const Partials partials{
          static_cast<const float4*>(a.partial_out) + source * (kLatent / 4) + 32 * chunk + lane,
          static_cast<const RowState*>(a.partial_lse) + source, rows};
      node = add_up(partials, member * request.count / 2, request.count / 2, group == 1);
      if (group == 1) node.add(add_up(partials, request.count / 2, request.count / 2, true));
    }
    if (group == 2) {
      shared.out[warp][lane] = node.out;
      if (lane == 0) shared.state[warp] = node.state;
      __syncthreads();
      if (member == 0) node.add({shared.state[warp + 1], shared.out[warp + 1][lane]});
      __syncthreads();
    }
    if (real && member == 0) {
      const int64_t target = output_row(a, request.number, row / a.rows, row % a.rows);
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
