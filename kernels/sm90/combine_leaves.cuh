// Batch-invariant mode: merges the pieces of requests that were cut, which are subtrees, as the
// decode kernel merges those of one thread block.
#pragma once

#include "sm90/combine.cuh"
#include "sm90/node.cuh"

namespace flashmla {

constexpr int kNodesInFlight = 8;  // whose vectors a lane has on their way
constexpr int kLog2MostBatches = 4;
static_assert(kNodesInFlight << kLog2MostBatches == FLASHMLA_MAX_LEAVES);

// Half a row of a node; a lane holds one vector of it.
struct HalfRow {
  NodeState state;
  uint4 values;

  // The node above two siblings.
  __device__ __forceinline__ HalfRow(const HalfRow& x, const HalfRow& y) {
    const SiblingWeights weights(x.state, y.state);
    state = weights.state;
    values =
        make_uint4(weights.merge(x.values.x, y.values.x), weights.merge(x.values.y, y.values.y),
                   weights.merge(x.values.z, y.values.z), weights.merge(x.values.w, y.values.w));
  }
  __device__ __forceinline__ HalfRow(const NodeState& state, const uint4& values)
      : state(state), values(values) {}
  HalfRow() = default;

  // The output's values.
  template <typename Element>
  __device__ __forceinline__ uint4 finish() const {
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
    float out[kVectorColumns];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[i]));
      out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
    }
    return pack_vector<Element>(out, state.inverse());
  }
};

// The pieces of half a row, `stride` rows apart.
struct Pieces {
  const uint4* out;
  const NodeState* states;
  int64_t stride;

  __device__ __forceinline__ HalfRow load(int i) const {
    const uint2 state = __ldcs(reinterpret_cast<const uint2*>(states + i * stride * kRowHalves));
    return {{__uint_as_float(state.x), static_cast<int>(state.y)},
            __ldcs(out + i * stride * (kLatent / kVectorColumns))};
  }

  // The node above `count` neighbours from `first` on, a power of two.
  __device__ __forceinline__ HalfRow node_above(int first, int count) const {
    HalfRow node, waiting[kLog2MostBatches];
#pragma unroll 1
    for (int batch = 0; batch * kNodesInFlight < count; ++batch) {
      HalfRow nodes[kNodesInFlight];
#pragma unroll
      for (int i = 0; i < kNodesInFlight; ++i) {
        if (i < count) nodes[i] = load(first + batch * kNodesInFlight + i);
      }
#pragma unroll
      for (int step = 1; step < kNodesInFlight; step *= 2) {
#pragma unroll
        for (int i = 0; i + step < kNodesInFlight; i += 2 * step) {
          if (i + step < count) nodes[i] = HalfRow(nodes[i], nodes[i + step]);
        }
      }
      node = nodes[0];
      bool carries = true;  // as in a thread block: merged_subtrees
#pragma unroll
      for (int level = 0; level < kLog2MostBatches; ++level) {
        if (!carries) continue;
        carries = batch >> level & 1;
        if (carries) {
          node = HalfRow(waiting[level], node);
        } else {
          waiting[level] = node;
        }
      }
    }
    return node;
  }
};

// A node on its way to another warp.
struct SharedHalfRow {
  uint4 values[32];
  NodeState state;
};

template <typename Element>
__global__ void __launch_bounds__(kCombineThreads, 1)
    combine_leaves_kernel(const __grid_constant__ DecodeArguments a) {
  __shared__ SharedHalfRow shared[kCombineWarps];
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
    if (real) {
      request = requests(a.all_rows.divide(unit / kRowHalves));
      active = min(group, request.count);
      const int64_t source = static_cast<int64_t>(request.first) * rows + row;
      const Pieces pieces{reinterpret_cast<const uint4*>(a.partial_out) +
                              source * (kLatent / kVectorColumns) + 32 * half + lane,
                          piece_state(a, source, half), rows};
      const int count = request.count / active;
      if (member < active) {
        node = pieces.node_above(member * count, count);
        if (discards) discard_half_rows(pieces.out, member * count, count, pieces.stride);
      }
    }
    for (int step = 1; step < group; step *= 2) {  // neighbours, then pairs of them
      if (member % (2 * step) == step) {
        shared[warp].values[lane] = node.values;
        if (lane == 0) shared[warp].state = node.state;
      }
      __syncthreads();
      if (member % (2 * step) == 0 && member + step < active)
        node = HalfRow(node, {shared[warp + step].state, shared[warp + step].values[lane]});
    }
    if (real && member == 0) {
      const int64_t target =
          output_row<false>(a, request.number, a.head_rows.divide(row), a.head_rows.remainder(row));
      reinterpret_cast<uint4*>(a.out)[target * (kLatent / kVectorColumns) + 32 * half + lane] =
          in_column_order(node.finish<Element>());
      if (half == 0 && lane == 0) a.lse[target] = node.state.lse();
    }
    if (group > 1) __syncthreads();  // the next round writes what may still be read
  }
}

}  // namespace flashmla
