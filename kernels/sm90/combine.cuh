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

// How a combine kernel's warps share slices and pieces, kInFlight of which a warp asks for at once.
struct Shares {
  uint32_t units;  // slices of all cut requests' rows
  int group_log2;  // of the warps that share a slice's pieces
  int blocks;      // that have something to do

  template <int kWords, int kInFlight>
  __device__ __forceinline__ static Shares of(const DecodeArguments& a, const CutRequests& requests,
                                              int splits) {
    if (splits == 0) return {0, 0, 0};
    constexpr int kCount = Slices<kWords>::kCount;
    const int cut = requests.count(), blocks = gridDim.x;
    const uint32_t units = kCount * cut * a.all_rows.divisor;
    // As many warps as there are, but no more than leave each, of a cut request's pieces on
    // average, over half of what it asks for at once.
    const int row_warps = a.all_rows.divide(blocks * (kCombineWarps / kCount));
    const int group_log2 =
        min(kCombineWarpsLog2, log2_of_ratio(min(row_warps, (2 * splits - 1) / kInFlight), cut));
    if (kWords > 1) return {units, group_log2, blocks};
    // Where rows are few a block that has to wait for an SM of the decode kernel is late by more
    // than it helps: as many as there are SMs which that left free, or most where it left none.
    const int needed = ((units << group_log2) + kCombineWarps - 1) >> kCombineWarpsLog2;
    const int row_tiles = (a.rows + kTileRows - 1) / kTileRows;
    const int free = blocks - splits * a.h_kv * row_tiles;
    return {units, group_log2,
            min(blocks, max(needed, 2 * free >= blocks ? free : 3 * blocks / 4))};
  }
};

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
  fetch_arguments(a);
  // What the decode kernel had waited for before it let this one start need not be waited for
  // again.
  CutRequests requests(a);
  const auto [units, group_log2, blocks] =
      Shares::of<kWords, kInFlight>(a, requests, __ldg(a.split_offsets + a.batch));
  if (blockIdx.x >= blocks) return ptx::wait_for_previous_kernel();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = a.all_rows.divisor;
  const int group = 1 << group_log2, member = warp & (group - 1);  // it takes every group-th piece
  for (uint32_t base = 0; base < units; base += blocks * (kCombineWarps >> group_log2)) {
    // Neighbours go to different thread blocks: few rows, many SMs.
    const uint32_t unit = base + (warp >> group_log2) * blocks + blockIdx.x;
    bool real = unit < units;
    const int slice = unit % Slices::kCount, all_row = unit / Slices::kCount;
    const int row = a.all_rows.remainder(all_row);
    CutRequest request{};
    if (real) {
      request = requests(a.all_rows.divide(all_row));
      // Nothing has been written of rows that the request has not.
      if (kRagged) real = a.head_rows.remainder(row) < request_rows<kRagged>(a, request.number);
    }
    const int64_t first = static_cast<int64_t>(request.first + member) * rows + row;
    const Pieces<kWords, kInFlight> pieces(
        Slices(a, first, group * rows, slice), a.partial_lse + first, group * rows,
        real ? (request.count - member + group - 1) >> group_log2 : 0);
    if (a.batch < 0) pieces.use_pointers();  // never: so they are worked out by now
    ptx::wait_for_previous_kernel();
    if (!real && group == 1) continue;

    const uint2 state = pieces.load_state(0);
    ptx::keep_order(a.batch, 0);
    Vector<kWords> x[kInFlight];
    pieces.load_first(x);
    // Worked out while those are on their way.
    const int64_t target =
        output_row<kRagged>(a, request.number, a.head_rows.divide(row), a.head_rows.remainder(row));
    const SliceOutput<kWords> output(a.out, target, slice, has_few_rows(a.rows));
    float* const lse = a.lse + target;
    if (a.batch < 0) output.use_pointers(), ptx::use_pointer(lse);
    Merge<kWords> merge;
    if (real) merge.template add_pieces<kDiscards>(pieces, state, x, Slices::half_of(slice));
    if (group > 1) {
      merge.put(shared[warp]);  // once: where warps share there are enough for all
      __syncthreads();
      if (member > 0) return;
      merge = Merge<kWords>::of_shares(shared + warp, group);
    }
    if (!real) continue;
    uint32_t pairs[kWords];
    merge.template get_pairs<Element>(pairs);
    output.store(pairs);
    if (slice == 0 && lane == 0) *lse = merge.log_sum();
  }
}

}  // namespace flashmla
