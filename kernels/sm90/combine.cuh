// Merges the partial results of requests that were cut:
// out = sum_i exp(lse_i - lse) out_i, lse = log sum_i exp(lse_i).
#pragma once

#include "sm90/cut_requests.cuh"
#include "sm90/merge.cuh"
#include "sm90/ptx/sync.cuh"

namespace flashmla {

constexpr int kCombineWarpsLog2 = 4, kCombineWarps = 1 << kCombineWarpsLog2;
constexpr int kCombineThreads = 32 * kCombineWarps;

// The greatest n >= 0 of which small * 2^n <= large; 0 if there is none.
__device__ __forceinline__ int log2_of_ratio(int large, int small) {
  const int n = max(0, __clz(small) - __clz(large));
  return n - (n > 0 && small << n > large);
}

template <typename Element, bool kRagged, int kBlocksPerSm>
__global__ void __launch_bounds__(kCombineThreads, kBlocksPerSm)
    combine_kernel(const __grid_constant__ DecodeArguments a) {
  constexpr int kInFlight = 8 / kBlocksPerSm;  // vectors on their way: more warps, fewer registers
  __shared__ SharedMerge shared[kCombineWarps];
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  CutRequests requests(a);
  const int splits = __ldg(a.split_offsets + a.batch);
  if (splits == 0) return;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int cut = requests.count(), rows = a.all_rows.divisor, units = kRowHalves * cut * rows;
  const int warps = gridDim.x * kCombineWarps;
  // The pieces of half a row are shared among as many warps as there are, but no more than leave
  // each, of a cut request's on average, over half of what it asks for at once; it takes every
  // group-th one.
  const int group_log2 =
      min(kCombineWarpsLog2,
          min(log2_of_ratio(warps, units), log2_of_ratio(2 * splits - 1, kInFlight * cut)));
  const int group = 1 << group_log2;
  // Where half a row is many warps' work it would take longer than it saves.
  const bool discards = group <= 4;
  const int member = warp & (group - 1), per_round = gridDim.x * kCombineWarps >> group_log2;
  for (int base = 0; base < units; base += per_round) {
    // Neighbours go to different thread blocks: few rows, many SMs.
    const int unit = base + (warp >> group_log2) * gridDim.x + blockIdx.x;
    bool real = unit < units;
    const int half = unit % kRowHalves, row = a.all_rows.remainder(unit / kRowHalves);
    CutRequest request{};
    Merge merge;
    if (real) {
      request = requests(a.all_rows.divide(unit / kRowHalves));
      // Nothing has been written of rows that the request has not.
      if (kRagged) real = a.head_rows.remainder(row) < request_rows<kRagged>(a, request.number);
    }
    if (real) {
      const int64_t source = static_cast<int64_t>(request.first + member) * rows + row;
      merge.add_splits<kInFlight>(reinterpret_cast<const uint4*>(a.partial_out) +
                                      source * (kLatent / kVectorColumns) + 32 * half + lane,
                                  reinterpret_cast<const uint2*>(a.partial_lse) + source, half,
                                  group * rows, (request.count - member + group - 1) >> group_log2,
                                  discards);
    }
    int vector = lane;  // in the order of columns
    uint4 out;
    if (group == 1) {
      out = in_column_order(pack_vector<Element>(merge.out, merge.inverse_sum()));
    } else {
      shared[warp].put(merge);  // once: where warps share half rows there are enough for all
      __syncthreads();
      vector = (member << (5 - group_log2)) + (lane >> group_log2);
      merge = merge_shares(shared + (warp - member), group, vector);
      out = pack_vector<Element>(merge.out, merge.inverse_sum());
    }
    if (real && (lane & (group - 1)) == 0) {
      const int kv_head = a.head_rows.divide(row), head_row = a.head_rows.remainder(row);
      const int64_t target = output_row<kRagged>(a, request.number, kv_head, head_row);
      reinterpret_cast<uint4*>(a.out)[target * (kLatent / kVectorColumns) + 32 * half + vector] =
          out;
      if (half == 0 && vector == 0) a.lse[target] = merge.log_sum();
    }
  }
}

}  // namespace flashmla
