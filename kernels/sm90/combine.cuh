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

// kWords: how much of a row is a warp's. The fewer rows, the less: then more of a row's pieces are
// on their way to one warp, and none need be merged among warps.
template <typename Element, bool kRagged, int kWords, int kBlocksPerSm>
__global__ void __launch_bounds__(kCombineThreads, kBlocksPerSm)
    combine_kernel(const __grid_constant__ DecodeArguments a) {
  using Slices = flashmla::Slices<kWords>;
  constexpr int kInFlight = (kWords == 4 ? 8 : 16) / kBlocksPerSm;
  constexpr bool kDiscards = kWords > 1;  // of few rows it would take longer than it saves
  __shared__ SharedMerge<kWords> shared[kCombineWarps];
  ptx::let_next_kernel_start();
  // What the decode kernel had waited for before it let this one start need not be waited for
  // again.
  CutRequests requests(a);
  const int splits = __ldg(a.split_offsets + a.batch);
  if (splits == 0) return ptx::wait_for_previous_kernel();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int cut = requests.count(), rows = a.all_rows.divisor, units = Slices::kCount * cut * rows;
  const int warps = gridDim.x * kCombineWarps;
  // The pieces of a slice are shared among as many warps as there are, but no more than leave
  // each, of a cut request's on average, over half of what it asks for at once; it takes every
  // group-th one.
  const int group_log2 =
      min(kCombineWarpsLog2,
          min(log2_of_ratio(warps, units), log2_of_ratio(2 * splits - 1, kInFlight * cut)));
  const int group = 1 << group_log2;
  const int member = warp & (group - 1), per_round = gridDim.x * kCombineWarps >> group_log2;
  for (int base = 0; base < units; base += per_round) {
    // Neighbours go to different thread blocks: few rows, many SMs.
    const int unit = base + (warp >> group_log2) * gridDim.x + blockIdx.x;
    bool real = unit < units;
    const int slice = unit % Slices::kCount, row = a.all_rows.remainder(unit / Slices::kCount);
    CutRequest request{};
    Merge<kWords> merge;
    if (real) {
      request = requests(a.all_rows.divide(unit / Slices::kCount));
      // Nothing has been written of rows that the request has not.
      if (kRagged) real = a.head_rows.remainder(row) < request_rows<kRagged>(a, request.number);
    }
    ptx::wait_for_previous_kernel();
    if (real) {
      const int64_t first = static_cast<int64_t>(request.first + member) * rows + row;
      merge.template add_pieces<kInFlight, kDiscards>(
          Slices(a, first, group * rows, slice), a.partial_lse + first, Slices::half_of(slice),
          group * rows, (request.count - member + group - 1) >> group_log2);
    }
    if (group > 1) {
      merge.put(shared[warp]);  // once: where warps share there are enough for all
      __syncthreads();
      if (member > 0) return;
      merge = Merge<kWords>::of_shares(shared + warp, group);
    }
    if (!real) continue;
    uint32_t pairs[kWords];
    merge.template get_pairs<Element>(pairs);
    const int64_t target =
        output_row<kRagged>(a, request.number, a.head_rows.divide(row), a.head_rows.remainder(row));
    store_slice<kWords>(a.out, target, slice, has_few_rows(a.rows), pairs);
    if (slice == 0 && lane == 0) a.lse[target] = merge.log_sum();
  }
}

}  // namespace flashmla
