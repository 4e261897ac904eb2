// Split-KV decode: one thread block per (64-row tile, KV head, part), persistent over the part's
// work items. Pairs of row tiles are clusters: of what both read each block loads half, for both.
//
//   producer    warp 0 streams the left half of each page's latent columns and its rope columns,
//               warp 1 the right half (TMA), through rings that carry on across work items;
//               warps 2-3 load the valid rows of Q (cp.async) as soon as the previous item has read
//               its own; those of the first item the right side, which has nothing to do yet
//   left        S = Q K^T, softmax, P to registers and shared memory, O[:, :256] += P V
//   right       takes P into registers at once; O[:, 256:] += P V while the left side is at the
//               next page's softmax: so the tensor cores have work then
//
// That takes a third buffer for right halves; its room are three column tiles of Q that the left
// side keeps in registers. P of a page goes from side to side by way of its rope columns, which
// nobody reads after S.
#pragma once

#include "sm90/bounds.cuh"
#include "sm90/decode_common.cuh"
#include "sm90/decode_shared.cuh"
#include "sm90/output.cuh"
#include "sm90/producer.cuh"
#include "sm90/ptx/cluster.cuh"
#include "sm90/ptx/copy.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/mbarrier.cuh"
#include "sm90/ptx/sync.cuh"
#include "sm90/ptx/wgmma.cuh"
#include "sm90/softmax.cuh"
#include "sm90/span.cuh"

namespace flashmla {

// Tiles of Q as A operands of wgmma: 16 columns each of this thread's two rows, of which the second
// may be absent.
using QueryRegisters = uint32_t[kRegisterTiles][4][4];

// What a thread loads of an item's Q into those: whole 16-byte vectors, every fourth of its rows;
// see arrange. Where its rows lie in a request is worked out beforehand, as by QueryCopies.
template <bool kRagged, int kThreadRows>
class QueryLoads {
 public:
  __device__ __forceinline__ QueryLoads(const DecodeArguments& a, int kv_head, int row_begin)
      : kv_head_(kv_head), row_begin_(row_begin) {
    if constexpr (!kRagged) set_rows(a, 0);
  }

  __device__ __forceinline__ void use_pointers() const {
    if constexpr (kRagged) return;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) ptx::use_pointer(rows_[r]);
  }

  __device__ __forceinline__ void load(const DecodeArguments& a, int request, QueryRegisters& q) {
    if constexpr (kRagged) set_rows(a, request);
    const int64_t offset = kRagged ? 0 : request * a.q_latent.batch_stride;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      rows_[r] += offset;
      ptx::pin_register(rows_[r]);  // or loads would work it out, each for itself
      const auto* source = reinterpret_cast<const uint4*>(rows_[r]);
#pragma unroll
      for (int i = 0; i < 2 * kRegisterTiles; ++i) {
        const uint4 v = __ldg(source + 4 * i);
        uint32_t (&vector)[4] = q[i / 2][i % 2 * 2 + r];
        vector[0] = v.x, vector[1] = v.y, vector[2] = v.z, vector[3] = v.w;
      }
    }
  }

 private:
  __device__ __forceinline__ void set_rows(const DecodeArguments& a, int request) {
    const int last = request_rows<kRagged>(a, request) - 1;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      const int row = min(row_begin_ + accumulator_row<kThreadRows>(r), last);
      rows_[r] = query_row<kRagged>(a, a.q_latent, request, kv_head_, row) +
                 kFirstRegisterTile * 64 + threadIdx.x % 4 * 8;
    }
  }

  int kv_head_, row_begin_;
  const uint16_t* rows_[kThreadRows];
};

// Gives each thread of a quad the columns that wgmma wants from it: word `lane % 4` of each vector.
template <int kThreadRows>
__device__ __forceinline__ void arrange_query_registers(QueryRegisters& q) {
#pragma unroll
  for (int i = 0; i < 2 * kRegisterTiles; ++i) {
    uint32_t (&x)[4] = q[i / 2][i % 2 * 2];
    uint32_t (&y)[4] = q[i / 2][i % 2 * 2 + 1];
    transpose_quad(x);
    if (kThreadRows == 1) {
      y[0] = y[1] = y[2] = y[3] = 0;
    } else {
      transpose_quad(y);
    }
    const uint32_t even[4] = {x[0], y[0], x[1], y[1]}, odd[4] = {x[2], y[2], x[3], y[3]};
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = even[j], y[j] = odd[j];
  }
}

// Column tiles of the next page's S that are issued behind P V before its page is freed, so that
// the tensor cores find work at once. All of S would take long, and the refill is what everything
// waits for; a block that is no cluster mostly has few rows, which wait for memory anyway.
template <int kClusterSize>
constexpr int kTilesAhead = kClusterSize > 1 ? 2 : 0;

// S [64, 64] = Q K^T of one page, a pair of tiles after the other as they arrive; of its column
// tiles kFirst .. kEnd - 1, before each of which `wait_for_query` is called.
template <typename Element, int kFirst, int kEnd, typename WaitForQuery>
__device__ __forceinline__ void start_scores(DecodeShared& shared, const Ring<kLeftStages>& left,
                                             const Ring<kRightStages>& right,
                                             const QueryRegisters& q_registers, float (&scores)[32],
                                             WaitForQuery wait_for_query) {
  using FromShared = typename ptx::Wgmma<Element>::Scores;
  using FromRegisters = typename ptx::Wgmma<Element>::ScoresFromRegisters;
  const uint64_t q = ptx::matrix_descriptor(shared.q, 0);
  const PageKeys keys(shared, left, right);
  if constexpr (kFirst == 0) ptx::pin_registers(scores);
#pragma unroll
  for (int tile = kFirst; tile < kEnd; ++tile) {
    wait_for_query(tile);
    wait_for_tile(shared, left, right, tile);
    if (tile % 2 == 0) ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint64_t k = keys.tile(tile), columns = step * ptx::kNextColumns16;
      if (tile >= kFirstRegisterTile && tile < kRopeTile) {
        ptx::mma<FromRegisters>(q_registers[tile - kFirstRegisterTile][step], k + columns, scores,
                                true);
      } else {
        const int slot = tile == kRopeTile ? kFirstRegisterTile : tile;
        ptx::mma<FromShared>(q + slot * ptx::kNextTile + columns, k + columns, scores,
                             tile + step > 0);
      }
    }
  }
  ptx::wgmma_commit();
}

template <int kThreadRows>
__device__ __forceinline__ void rescale_output(float (&o)[128],
                                               const float (&factor)[kThreadRows]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) {
    if (((i >> 1) & 1) < kThreadRows) o[i] *= factor[(i >> 1) & 1];
  }
}

// Where the row of columns 16 k .. 16 k + 15 of P that this thread names lies in the page's rope
// tile, on the way from the left side's A-operand registers to the right side's.
__device__ __forceinline__ uint32_t probabilities_address(uint8_t* tile, int k) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const int row = warp * 16 + lane % 16, chunk = (lane / 16) ^ (row % 8);
  return ptx::smem_address(tile + row * 128 + chunk * 16) ^ (k * 32);
}

template <typename Element, bool kInvariant, bool kRagged, int kThreadRows, int kClusterSize>
__device__ __forceinline__ void run_left(const DecodeArguments& a, DecodeShared& shared,
                                         int row_begin, int kv_head) {
  using Queries = QueryLoads<kRagged, kThreadRows>;
  Queries first_query(a, kv_head, row_begin);
  if (a.batch < 0) first_query.use_pointers();  // never: so they are worked out by now
  const PartItems items(a);
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  Ring<kLeftStages> ring;
  Ring<kRightStages> right_ring;
  uint32_t q_parity = 0;
  float o[128];
  float scores[32];
  uint32_t p[4][4];
  QueryRegisters q_registers;
  const int last = items.last;
  const auto query_is_there = [](int) {};
  const auto load_next_query = [&](int i) {
    if (i < last) Queries(a, kv_head, row_begin).load(a, Item(a.items[i]).request, q_registers);
  };
  if (items.first < last) first_query.load(a, items.item(a, items.first).request, q_registers);
  for (int i = items.first; i < last; ++i) {
    const Item item(a.items[i]);
    if (item.pages() == 0) {
      store_empty<Element, kRagged>(a, item, kv_head, row_begin);
      load_next_query(i + 1);
      continue;
    }
    const int length = request_length(a, item.request);
    int limit[kThreadRows];  // tokens that each of this thread's rows sees
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      const int last_row = request_rows<kRagged>(a, item.request) - 1;
      const int token = a.group.divide(min(row_begin + accumulator_row<kThreadRows>(r), last_row));
      limit[r] = a.causal ? length - request_queries<kRagged>(a, item.request) + token + 1 : length;
      ptx::pin_register(limit[r]);  // or every page would work it out
    }
    OnlineSoftmax<kThreadRows, kInvariant> softmax;
    Span<kInvariant> span(a, item, length);

    arrange_query_registers<kThreadRows>(q_registers);
    // Of the first page; for all others Q is there.
    start_scores<Element, 0, kTiles>(shared, ring, right_ring, q_registers, scores, [&](int tile) {
      if (tile < kFirstRegisterTile && tile % 2 == 0)
        ptx::mbarrier_wait(&shared.q_full[tile / 2], q_parity);
    });
    q_parity ^= 1;
    if (lane == 0) ptx::mbarrier_arrive(&shared.scores_issued[right_ring.stage]);
    ptx::wgmma_wait<0>();
    ptx::pin_registers(scores);
    for (int page = item.page_begin; page < item.page_end; ++page) {
      const int stage = ring.stage;
      const bool final = page + 1 == item.page_end, span_ends = page + 1 == span.end;
      if (final) {
        if (lane == 0) ptx::mbarrier_arrive(&shared.q_empty);
        load_next_query(i + 1);
      }
      // A warp's wait speaks for its own part of S: P may overwrite the rope tile when all have
      // read it.
      ptx::named_barrier_sync(kLeftGroup, 128);

      int visible[kThreadRows];
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) visible[r] = limit[r] - page * kTileTokens;
      float rescale[kThreadRows];
      const bool must_rescale = softmax.advance(scores, visible, a.scale_log2, rescale);
      if (must_rescale && !span.fresh) rescale_output(o, rescale);
      const int valid_rows = length - page * kTileTokens;
      if (valid_rows < kTileTokens) {
        zero_tail(shared.left[stage], valid_rows);
        ptx::named_barrier_sync(kLeftGroup, 128);
      }

      // Each k step of P V starts while the next one's exponentials are computed. In
      // batch-invariant mode the last three start together: with branches there are too few
      // registers.
      const uint64_t v = ptx::matrix_descriptor(shared.left[stage], ptx::kTileBytes);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (!kInvariant && k > 0) ptx::keep_order(a.batch, k);
        softmax.template exponentiate<Element>(scores, k, a.scale_log2, p[k]);
        ptx::wgmma_fence();
        ptx::mma<typename ptx::Wgmma<Element>::Values>(p[k], v + k * ptx::kNextRows16, o,
                                                       k > 0 || !span.fresh);
        if (k >= 2) ptx::wgmma_commit();  // the last step is a group of its own
        ptx::store_matrices(probabilities_address(shared.rope[stage], k), p[k]);
      }
      span.fresh = false;

      if (lane == 0) shared.must_rescale[stage][warp] = must_rescale;
      if (must_rescale && lane % 4 == 0) {
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r)
          shared.rescale[stage][accumulator_row<kThreadRows>(r)] = rescale[r];
      }
      if (span_ends) {
        softmax.finish();
        if (lane % 4 == 0) {
#pragma unroll
          for (int r = 0; r < kThreadRows; ++r) {
            const int row = accumulator_row<kThreadRows>(r);
            shared.sum[stage][row] = softmax.sum[r];
            if (kInvariant) shared.anchor[stage][row] = softmax.anchor[r];
          }
        }
      }
      const auto hand_over = [&] {
        ptx::fence_async_proxy();
        ptx::mbarrier_arrive(&shared.p_full[stage]);
      };

      ring.advance();
      right_ring.advance();
      if (final) {
        hand_over();
        ptx::wgmma_wait<0>();
        ptx::pin_registers(o);
        release_half<kClusterSize>(&shared.left_empty[stage]);
        break;
      }
      constexpr int kAhead = kTilesAhead<kClusterSize>;
      if constexpr (kAhead > 0) {
        ptx::wgmma_wait<1>();  // all but the last step: no registers for all of P beside S
        start_scores<Element, 0, kAhead>(shared, ring, right_ring, q_registers, scores,
                                         query_is_there);
      }
      hand_over();  // no sooner: the right side waits for all of S anyway
      ptx::wgmma_wait<kAhead == 0 ? 0 : 1>();
      ptx::pin_registers(o);
      release_half<kClusterSize>(&shared.left_empty[stage]);
      start_scores<Element, kAhead, kTiles>(shared, ring, right_ring, q_registers, scores,
                                            query_is_there);
      // What is issued takes a little longer, and so does the right side to take up the last page.
      if (lane == 0) ptx::mbarrier_arrive(&shared.scores_issued[right_ring.stage]);
      if constexpr (kInvariant) {
        if (span_ends) {
          RowState leaf[kThreadRows];
          softmax.get_rows(leaf);
          end_leaf(a, item, length, row_begin, 0, leaf, span, o);
          softmax = {};
        }
      } else {
        const int seen = page + 1 - item.page_begin;
        softmax.allow_growth(static_cast<float>(pages_of(length)) * ptx::reciprocal_fast(seen));
      }
      ptx::wgmma_wait<0>();
      ptx::pin_registers(scores);
    }

    RowState rows[kThreadRows];
    softmax.get_rows(rows);
    if constexpr (kInvariant) {
      end_item<Element>(a, item, kv_head, row_begin, 0, rows, span, o);
      continue;
    }
    const bool whole = item.split < 0;
    float factor[kThreadRows];
    get_inverses(rows, factor);
    store_output<Element, kRagged>(a, item, kv_head, row_begin, 0, o, factor);
    if (lane % 4 == 0) {
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
        const int row = row_begin + accumulator_row<kThreadRows>(r);
        if (row >= request_rows<kRagged>(a, item.request)) continue;
        if (whole) {
          a.lse[output_row<kRagged>(a, item.request, kv_head, row)] = rows[r].lse();
        } else {
          a.partial_lse[partial_row(a, item.split, kv_head, row)].lse = rows[r].lse();
        }
      }
    }
  }
}

template <typename Element, bool kInvariant, bool kRagged, int kThreadRows, int kClusterSize>
__device__ __forceinline__ void run_right(const DecodeArguments& a, DecodeShared& shared,
                                          int row_begin, int kv_head, const PartItems& items) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  Ring<kRightStages> ring;
  Ring<kLeftStages> p_ring;
  const int last = items.last;
  float o[128];
  uint32_t p[4][4];
  for (int i = items.first; i < last; ++i) {
    const Item item(a.items[i]);
    if (item.pages() == 0) {
      store_empty<Element, kRagged>(a, item, kv_head, row_begin);
      continue;
    }
    const int length = request_length(a, item.request);
    Span<kInvariant> span(a, item, length);
    RowState leaf[kThreadRows];  // or of the whole item
    for (int page = item.page_begin; page < item.page_end; ++page) {
      for (int pair = 0; pair < 2; ++pair) {
        ptx::mbarrier_wait(&shared.right_full[ring.stage][pair], ring.parity);
      }
      const int valid_rows = length - page * kTileTokens;
      if (valid_rows < kTileTokens) {
        zero_tail(shared.right[ring.stage], valid_rows);
        ptx::named_barrier_sync(kRightGroup, 128);
      }
      const bool final = page + 1 == item.page_end, span_ends = page + 1 == span.end;
      // No barrier completes unseen: that of a span's first page would, and P comes later anyway.
      if (span.fresh) ptx::mbarrier_wait(&shared.scores_issued[ring.stage], ring.parity);
      ptx::mbarrier_wait(&shared.p_full[p_ring.stage], p_ring.parity);
      if (!span.fresh && shared.must_rescale[p_ring.stage][warp]) {
        float factor[kThreadRows];
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r)
          factor[r] = shared.rescale[p_ring.stage][accumulator_row<kThreadRows>(r)];
        rescale_output(o, factor);
      }
      if (span_ends) {
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r) {
          const int row = accumulator_row<kThreadRows>(r);
          if (kInvariant) leaf[r].anchor = shared.anchor[p_ring.stage][row];
          leaf[r].sum = shared.sum[p_ring.stage][row];
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k)
        ptx::load_matrices(probabilities_address(shared.rope[p_ring.stage], k), p[k]);
      // The rope columns of the next page but one take this slot as soon as P is in registers. An
      // arrival alone would overtake the loads.
      ptx::fence_async_proxy();
      __syncwarp();
      if (lane == 0)
        release<kClusterSize>(&shared.rope_empty[p_ring.stage],
                              loader_of<kClusterSize>(p_ring.stage));
      Ring<kRightStages> next = ring;
      next.advance();
      if (!span_ends) ptx::mbarrier_wait(&shared.scores_issued[next.stage], next.parity);
      const uint64_t v = ptx::matrix_descriptor(shared.right[ring.stage], ptx::kTileBytes);
      ptx::pin_registers(o);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        ptx::mma<typename ptx::Wgmma<Element>::Values>(p[k], v + k * ptx::kNextRows16, o,
                                                       k > 0 || !span.fresh);
      }
      ptx::wgmma_commit();
      span.fresh = false;
      ptx::wgmma_wait<0>();
      ptx::pin_registers(o);
      release_half<kClusterSize>(&shared.right_empty[ring.stage]);
      ring = next;
      p_ring.advance();
      if constexpr (kInvariant) {
        if (span_ends && !final) end_leaf(a, item, length, row_begin, 1, leaf, span, o);
      }
    }
    if constexpr (kInvariant) {
      end_item<Element>(a, item, kv_head, row_begin, 1, leaf, span, o);
      continue;
    }
    float factor[kThreadRows];
    get_inverses(leaf, factor);
    store_output<Element, kRagged>(a, item, kv_head, row_begin, 1, o, factor);
  }
}

// grid: (row tiles, H_kv, parts), so that neighbours read the same pages at the same time.
template <typename Element, bool kInvariant, bool kRagged, int kThreadRows, int kClusterSize>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeArguments a) {
  extern __shared__ uint8_t raw_shared[];
  // An offset, not a rounded pointer: the compiler must see that this is shared memory.
  const uint32_t padding = -ptx::smem_address(raw_shared) & 1023;
  auto& shared = *reinterpret_cast<DecodeShared*>(raw_shared + padding);
  const int row_begin = blockIdx.x * kTileRows, kv_head = blockIdx.y;

  fetch_arguments(a);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&a.kv_map);
    init_barriers<kClusterSize>(shared);
  }
  if constexpr (kClusterSize > 1) {
    ptx::cluster_sync_relaxed();
  } else {
    __syncthreads();
  }

  // Each role waits for the kernel before where its own code begins: that is fetched meanwhile.
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    run_producer<QueriesInTiles<kThreadRows>, kRagged, kClusterSize>(a, shared, row_begin, kv_head);
  } else if (warpgroup == 1) {
    ptx::register_increase<kLeftRegisters>();
    run_left<Element, kInvariant, kRagged, kThreadRows, kClusterSize>(a, shared, row_begin,
                                                                      kv_head);
  } else {
    ptx::register_increase<kRightRegisters>();
    const PartItems items =
        load_first_queries<QueriesInTiles<kThreadRows>, kRagged>(a, shared, row_begin, kv_head);
    run_right<Element, kInvariant, kRagged, kThreadRows, kClusterSize>(a, shared, row_begin,
                                                                       kv_head, items);
  }
}

}  // namespace flashmla
