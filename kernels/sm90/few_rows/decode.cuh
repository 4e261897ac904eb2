// Decode of at most kFewRows query rows a request and KV head: roles and rings of sm90/decode.cuh,
// products with their operands exchanged.
//
//   left        S^T = K Q^T, softmax, P^T to shared memory, O^T[:256] += V^T P^T
//   right       O^T[256:] += V^T P^T
//
// All of Q is in shared memory, P in the page's rope tile, where both sides read it until they free
// the page. A row's tokens are spread over the warps, so that its maximum is known to none of them.
// The vote about rescaling is one of the warpgroup, at the barrier that P waits for anyway. What a
// row's numbers come to is worked out by a lane of each warp.
#pragma once

#include "sm90/decode_common.cuh"
#include "sm90/decode_shared.cuh"
#include "sm90/few_rows/output.cuh"
#include "sm90/few_rows/softmax.cuh"
#include "sm90/producer.cuh"

namespace flashmla::few_rows {

// S^T [64, kFewRows] of one page, a pair of tiles after the other as they arrive.
template <typename Element>
__device__ __forceinline__ void start_scores(DecodeShared& shared, const Ring<kLeftStages>& left,
                                             const Ring<kRightStages>& right,
                                             float (&scores)[kAccumulator]) {
  using Mma = typename ptx::Wgmma<Element>::FewScores;
  const uint64_t q = ptx::matrix_descriptor(Shared::of(shared).q, 0);
  const PageKeys keys(shared, left, right);
  ptx::pin_registers(scores);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    wait_for_tile(shared, left, right, tile);
    if (tile % 2 == 0) ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint64_t k = keys.tile(tile), columns = step * ptx::kNextColumns16;
      ptx::mma<Mma>(k + columns, q + tile * (FewQueries::kTileBytes >> 4) + columns, scores,
                    tile + step > 0);
    }
  }
  ptx::wgmma_commit();
}

// Starts O^T += V^T P^T of one half of a page, or = if it is the first.
template <typename Element>
__device__ __forceinline__ void start_values(const Tile* half, const Tile& probabilities,
                                             bool first, Output& o) {
  using Mma = typename ptx::Wgmma<Element>::FewValues;
  const uint64_t v = ptx::matrix_descriptor(half, ptx::kTileBytes);
  const uint64_t p = ptx::matrix_descriptor(probabilities, 0);
  pin_output(o);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int tile = 0; tile < kHalfTiles; ++tile)
      ptx::mma<Mma>(v + tile * ptx::kNextTile + k * ptx::kNextRows16, p + k * ptx::kNextColumns16,
                    o[tile], k > 0 || !first);
  }
  ptx::wgmma_commit();
}

__device__ __forceinline__ void wait_for_values(Output& o) {
  ptx::wgmma_wait<0>();
  pin_output(o);
}

// The sums of an item, which the left side hands over at barriers of their own when its last P V
// has begun.
struct Sums {
  uint32_t parities = 0;  // by stage

  // That of the lane's row; before the page is released.
  __device__ __forceinline__ float wait(Shared& shared, int stage) {
    ptx::mbarrier_wait(&shared.sum_full[stage], parities >> stage & 1);
    parities ^= 1u << stage;
    return shared.sum[stage].get();
  }
};

// One half of O. `sum`: of the lane's row.
template <typename Element, bool kRagged>
__device__ __forceinline__ void store_item(const DecodeArguments& a, Shared& shared,
                                           const Item& item, int kv_head, int half, const Output& o,
                                           float sum, ByWarp<Maximum>& largest) {
  Room& room = shared.rooms[threadIdx.x / 32 - 4];
  if (item.split < 0) {
    store_whole<Element, kRagged>(a, item, kv_head, half, o, inverse_of(sum), room);
  } else {
    store_partial<kRagged>(a, item, kv_head, half, o, inverse_of(sum), room, largest);
  }
}

template <typename Element, bool kRagged>
__device__ __forceinline__ void run_left(const DecodeArguments& a, DecodeShared& shared,
                                         int kv_head, const PartItems& items) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  auto& own = Shared::of(shared);
  Ring<kLeftStages> ring;
  Ring<kRightStages> right_ring;
  Sums sums;
  uint32_t q_parity = 0;
  Output o;
  float scores[kAccumulator];
  for (int i = items.first; i < items.last; ++i) {
    const Item item = items.item(a, i);
    if (item.pages() == 0) {
      store_empty<Element, kRagged>(a, item, kv_head, 0);
      continue;
    }
    const int length = request_length(a, item.request);
    const int rows = request_rows<kRagged>(a, item.request);
    // Tokens that all rows see, and how many more each of this thread's rows.
    const int least = a.causal ? length - request_queries<kRagged>(a, item.request) + 1 : length;
    int more[kOwnRows];
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      more[r] = a.causal ? a.group.divide(min(own_row(r), rows - 1)) : 0;
      ptx::pin_register(more[r]);  // or every page would work it out
    }
    OnlineSoftmax softmax;
    ptx::mbarrier_wait(&shared.q_full[0], q_parity);
    q_parity ^= 1;
    float sum = 0.0f;  // of the lane's row
    for (int page = item.page_begin; page < item.page_end; ++page) {
      const int stage = ring.stage;
      const bool first = page == item.page_begin, final = page + 1 == item.page_end;
      start_scores<Element>(shared, ring, right_ring, scores);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(scores);
      if (final && lane == 0) ptx::mbarrier_arrive(&shared.q_empty);
      const int visible = least - page * kTileTokens;
      if (visible < kTileTokens) {
#pragma unroll
        for (int x = 0; x < kAccumulator; ++x)
          if (accumulator_row(x) >= visible + more[row_index(x)]) scores[x] = kNegativeInfinity;
      }
      float rescale[kOwnRows], rescale_row;
      const bool must_rescale =
          softmax.advance(scores, a.scale_log2, page - item.page_begin, pages_of(length), own,
                          own.rooms[warp], rescale, rescale_row);
      if (must_rescale && !first) {
        rescale_output(o, rescale);
        if (warp == 0) own.rescale[stage].x[Line::place_of(row_of_lane())] = rescale_row;
      }
      if (lane == 0) shared.must_rescale[stage][warp] = must_rescale;
      softmax.template store_probabilities<Element>(scores, shared.rope[stage]);
      const int valid_rows = length - page * kTileTokens;
      if (valid_rows < kTileTokens) zero_tail(shared.left[stage], valid_rows);
      ptx::fence_async_proxy();
      ptx::mbarrier_arrive(&shared.p_full[stage]);
      ptx::mbarrier_wait(&shared.p_full[stage], ring.parity);
      start_values<Element>(shared.left[stage], shared.rope[stage], first, o);
      if (final) {
        own.sum[stage].put(softmax.sum);
        ptx::mbarrier_arrive(&own.sum_full[stage]);
        sum = sums.wait(own, stage);
      }
      wait_for_values(o);
      release_half<1>(&shared.left_empty[stage]);
      ring.advance();
      right_ring.advance();
    }
    store_item<Element, kRagged>(a, own, item, kv_head, 0, o, sum, own.left_largest);
    if (warp == 0 && lane < min(rows, kFewRows)) {
      const float lse = RowState{softmax.anchor, sum}.lse();
      if (item.split < 0) {
        a.lse[output_row<kRagged>(a, item.request, kv_head, lane)] = lse;
      } else {
        a.partial_lse[partial_row(a, item.split, kv_head, lane)].lse = lse;
      }
    }
  }
}

template <typename Element, bool kRagged>
__device__ __forceinline__ void run_right(const DecodeArguments& a, DecodeShared& shared,
                                          int kv_head, const PartItems& items) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  auto& own = Shared::of(shared);
  Ring<kRightStages> ring;
  Ring<kLeftStages> p_ring;
  Sums sums;
  bool odd = false;
  Output o;
  for (int i = items.first; i < items.last; ++i) {
    const Item item = items.item(a, i);
    if (item.pages() == 0) {
      store_empty<Element, kRagged>(a, item, kv_head, 0);
      continue;
    }
    const int length = request_length(a, item.request);
    float sum = 0.0f;  // of the lane's row
    for (int page = item.page_begin; page < item.page_end; ++page) {
      const bool first = page == item.page_begin, final = page + 1 == item.page_end;
      const int stage = p_ring.stage;
      for (int pair = 0; pair < 2; ++pair)
        ptx::mbarrier_wait(&shared.right_full[ring.stage][pair], ring.parity);
      const int valid_rows = length - page * kTileTokens;
      if (valid_rows < kTileTokens) {
        zero_tail(shared.right[ring.stage], valid_rows);
        ptx::named_barrier_sync(kRightGroup, 128);
      }
      ptx::mbarrier_wait(&shared.p_full[stage], p_ring.parity);
      if (!first && shared.must_rescale[stage][warp]) {
        float factor[kOwnRows];
        own.rescale[stage].load_own(factor);
        rescale_output(o, factor);
      }
      start_values<Element>(shared.right[ring.stage], shared.rope[stage], first, o);
      if (final) sum = sums.wait(own, stage);
      wait_for_values(o);
      __syncwarp();  // all lanes have read their sums and factors
      // The left side's reads of P end with left_empty, which who loads rope columns waits for
      // first.
      if (lane == 0) ptx::mbarrier_arrive(&shared.rope_empty[stage]);
      release_half<1>(&shared.right_empty[ring.stage]);
      ring.advance();
      p_ring.advance();
    }
    store_item<Element, kRagged>(a, own, item, kv_head, 1, o, sum, own.right_largest[odd]);
    // Only where the barrier of partial results has shown that all have read the other one.
    if (item.split >= 0) odd = !odd;
  }
}

// grid: (1, H_kv, parts), as decode_kernel's.
template <typename Element, bool kRagged>
__global__ void __launch_bounds__(kThreads, 1)
    decode_few_rows_kernel(const __grid_constant__ DecodeArguments a) {
  extern __shared__ uint8_t raw_shared[];
  const uint32_t padding = -ptx::smem_address(raw_shared) & 1023;
  auto& shared = *reinterpret_cast<DecodeShared*>(raw_shared + padding);
  const int kv_head = blockIdx.y, warpgroup = threadIdx.x / 128;
  fetch_arguments(a);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&a.kv_map);
    init_barriers<1>(shared);
    for (ptx::Mbarrier& barrier : Shared::of(shared).sum_full) ptx::mbarrier_init(&barrier, 128);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (warpgroup == 0) {
    run_producer<FewQueries, kRagged, 1>(a, shared, 0, kv_head);
  } else if (warpgroup == 1) {
    ptx::register_increase<kLeftRegisters>();
    const PartItems items(a);
    run_left<Element, kRagged>(a, shared, kv_head, items);
  } else {
    ptx::register_increase<kRightRegisters>();
    const PartItems items = load_first_queries<FewQueries, kRagged>(a, shared, 0, kv_head);
    run_right<Element, kRagged>(a, shared, kv_head, items);
  }
}

}  // namespace flashmla::few_rows
