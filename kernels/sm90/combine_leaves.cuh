// Batch-invariant mode: merges the pieces of requests that were cut, which are subtrees, as the
// decode kernel merges those of one thread block.
#pragma once

#include "sm90/combine.cuh"
#include "sm90/rooms.cuh"

namespace flashmla {

constexpr int kNodesInFlight = 8;  // whose vectors a lane has on their way
constexpr int kLog2MostBatches = 3;
static_assert(kNodesInFlight << kLog2MostBatches == FLASHMLA_MAX_LEAVES / 2);

// Half a row of a node; a lane holds one vector of it.
struct Node {
  float lse, down;  // values are to be multiplied by the latter
  uint4 values;     // fp16
};

// Two nodes in one, which is rounded unless it is the root.
struct MergedNode {
  float lse;
  float out[kVectorColumns];

  __device__ __forceinline__ MergedNode(const Node& first, const Node& second) {
    const MergeWeights weights(first.lse, second.lse);
    lse = weights.lse;
    const float first_scale = __fmul_rn(weights.first, first.down);
    const float second_scale = __fmul_rn(weights.second, second.down);
    const uint32_t x[4] = {first.values.x, first.values.y, first.values.z, first.values.w};
    const uint32_t y[4] = {second.values.x, second.values.y, second.values.z, second.values.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 merged = merge_pair(x[i], first_scale, y[i], second_scale);
      out[2 * i] = merged.x, out[2 * i + 1] = merged.y;
    }
  }

  __device__ __forceinline__ Node round() const {
    float largest = 0.0f;
#pragma unroll
    for (const float x : out) largest = fmaxf(largest, fabsf(x));
    largest = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(largest)));
    const Fp16Scale scale(largest);
    return {lse, scale.down, pack_vector<__half>(out, scale.up)};
  }
};

// The pieces of half a row, `stride` rows apart.
struct Pieces {
  const uint4* out;
  const uint2* states;  // PartialStates
  int half;
  int64_t stride;

  __device__ __forceinline__ Node load(int i) const {
    const uint2 state = __ldcs(states + i * stride);
    return {__uint_as_float(state.x), scale_of(state.y, half),
            __ldcs(out + i * stride * (kLatent / kVectorColumns))};
  }

  // The node above `count` neighbours from `first` on, a power of two.
  __device__ __forceinline__ Node node_above(int first, int count) const {
    Node node, waiting[kLog2MostBatches];
#pragma unroll 1
    for (int batch = 0; batch * kNodesInFlight < count; ++batch) {
      Node nodes[kNodesInFlight];
#pragma unroll
      for (int i = 0; i < kNodesInFlight; ++i) {
        if (i < count) nodes[i] = load(first + batch * kNodesInFlight + i);
      }
#pragma unroll
      for (int step = 1; step < kNodesInFlight; step *= 2) {
#pragma unroll
        for (int i = 0; i + step < kNodesInFlight; i += 2 * step) {
          if (i + step < count) nodes[i] = MergedNode(nodes[i], nodes[i + step]).round();
        }
      }
      node = nodes[0];
      bool carries = true;  // as in a thread block: merged_subtrees
#pragma unroll
      for (int level = 0; level < kLog2MostBatches; ++level) {
        if (!carries) continue;
        carries = batch >> level & 1;
        if (carries) {
          node = MergedNode(waiting[level], node).round();
        } else {
          waiting[level] = node;
        }
      }
    }
    return node;
  }
};

// A node on its way to another warp.
struct SharedNode {
  uint4 values[32];
  float lse, down;
};

template <typename Element>
__global__ void __launch_bounds__(kCombineThreads, 1)
    combine_leaves_kernel(const __grid_constant__ DecodeArguments a) {
  __shared__ SharedNode shared[kCombineWarps];
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  CutRequests requests(a);
  const int splits = __ldg(a.split_offsets + a.batch);
  if (splits == 0) return;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int cut = requests.count(), rows = a.all_rows.divisor, units = kRowHalves * cut * rows;
  const int warps = gridDim.x * kCombineWarps;
  // At least two warps a half row: each has a child of the root, or a subtree of one.
  int group = 2;
  while (2 * group <= kCombineWarps && units * 2 * group <= warps && 2 * group * cut <= splits)
    group *= 2;
  const bool discards = group <= 4;  // where few rows are many warps' work it takes too long
  const int member = warp % group, per_round = gridDim.x * (kCombineWarps / group);
  for (int base = 0; base < units; base += per_round) {
    const int unit = base + warp / group * gridDim.x + blockIdx.x;
    const bool real = unit < units;
    const int half = unit % kRowHalves, row = a.all_rows.remainder(unit / kRowHalves);
    CutRequest request{};
    int active = 0;  // members with a subtree of the request
    Node node;
    if (real) {
      request = requests(a.all_rows.divide(unit / kRowHalves));
      active = min(group, request.count);
      const int64_t source = static_cast<int64_t>(request.first) * rows + row;
      const Pieces pieces{reinterpret_cast<const uint4*>(a.partial_out) +
                              source * (kLatent / kVectorColumns) + 32 * half + lane,
                          reinterpret_cast<const uint2*>(a.partial_lse) + source, half, rows};
      const int count = request.count / active;
      if (member < active) {
        node = pieces.node_above(member * count, count);
        if (discards) discard_half_rows(pieces.out, member * count, count, pieces.stride);
      }
    }
    for (int step = 1; step < group; step *= 2) {  // neighbours, then pairs of them
      if (member % (2 * step) == step) {
        shared[warp].values[lane] = node.values;
        if (lane == 0) shared[warp].lse = node.lse, shared[warp].down = node.down;
      }
      __syncthreads();
      if (member % (2 * step) != 0 || member + step >= active) continue;
      const SharedNode& other = shared[warp + step];
      const MergedNode merged(node, {other.lse, other.down, other.values[lane]});
      if (2 * step < active) {
        node = merged.round();
      } else {
        const int64_t target = output_row<false>(a, request.number, a.head_rows.divide(row),
                                                 a.head_rows.remainder(row));
        reinterpret_cast<uint4*>(a.out)[target * (kLatent / kVectorColumns) + 32 * half + lane] =
            in_column_order(pack_vector<Element>(merged.out, 1.0f));
        if (half == 0 && lane == 0) a.lse[target] = merged.lse;
      }
    }
    __syncthreads();  // the next round writes what may still be read
  }
}

}  // namespace flashmla
