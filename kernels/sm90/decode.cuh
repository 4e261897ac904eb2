// Split-KV decode: one thread block per (64-row tile, KV head, part), persistent over the part's
// work items.
//
//   producer    warp 0 streams pages into a two-stage ring (TMA) that carries on across work items;
//               warps 1-3 load the valid rows of Q (cp.async) as soon as the previous item has read
//               its own
//   left        S = Q K^T, softmax, P to registers and shared memory, O[:, :256] += P V
//   right       O[:, 256:] += P V with P from shared memory
//
// P of a page takes the place of that page's rope columns, which nobody reads after S.
#pragma once

#include "sm90/decode_params.cuh"
#include "sm90/ptx/copy.cuh"
#include "sm90/ptx/mbarrier.cuh"
#include "sm90/ptx/sync.cuh"
#include "sm90/ptx/wgmma.cuh"
#include "sm90/softmax.cuh"

namespace flashmla {

constexpr int kStages = 2;
constexpr int kThreads = 384;
constexpr int kRopeTile = kTiles - 1;
constexpr int kHalfTiles = 4;  // column tiles of half a latent
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = 224;  // with the producer 504 = 3 x 168, the launch allocation

// A page arrives in groups of column tiles, so that S starts before the page is complete.
constexpr int kGroups = 4;
__device__ constexpr int group_begin(int group) { return group == kGroups ? kTiles : 2 * group; }

using Tile = uint8_t[ptx::kTileBytes];

struct DecodeShared {
  alignas(1024) Tile q[kTiles];
  alignas(1024) Tile kv[kStages][kTiles];  // kv[.][kRopeTile] becomes P
  float rescale[kStages][kTileRows];       // factor of O before this page's P V
  bool must_rescale[kStages][4];           // by warp
  float inverse_sum[kStages][kTileRows];
  ptx::Mbarrier q_full, q_empty;
  ptx::Mbarrier kv_full[kStages][kGroups];
  ptx::Mbarrier left_empty[kStages];  // tiles 0 .. 3, released by the left warpgroup
  ptx::Mbarrier
      right_empty[kStages];  // tiles 4 .. 8, released by the right one: by then S is long done
};
static_assert(sizeof(DecodeShared) + 1024 <= 232448, "shared memory of an SM");

// Named barriers; 0 is __syncthreads. The first exists once per stage: the right warpgroup frees
// P's place only after its own wait, so the left one is never a full round ahead.
enum Barrier : int { kProbabilitiesReady = 1, kLeftGroup = 1 + kStages };

struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    stage ^= 1;
    parity ^= (stage == 0);
  }
};

struct Item {
  int request, page_begin, page_end, split;
  __device__ __forceinline__ explicit Item(int4 v)
      : request(v.x), page_begin(v.y), page_end(v.z), split(v.w) {}
  __device__ __forceinline__ int pages() const { return page_end - page_begin; }
};

// --- producer ---

__device__ __forceinline__ void stream_pages(const DecodeArguments& a, DecodeShared& shared,
                                             int kv_head, int first, int last) {
  const int lane = threadIdx.x % 32;
  const uint32_t group_bytes =
      (lane == kGroups - 1 ? kTiles - group_begin(kGroups - 1) : 2) * ptx::kTileBytes;
  RingPosition ring;
  for (int i = first; i < last; ++i) {
    const Item item(__ldg(a.items + i));
    const int32_t* table = a.block_table + item.request * a.block_table_stride;
    for (int base = item.page_begin; base < item.page_end; base += 32) {
      // Every lane looks up one page, so that table reads are a thirty-second of the waits.
      const int own = base + lane;
      const int page_id = own < item.page_end ? __ldg(table + own / a.tiles_per_page) : 0;
      const int count = min(32, item.page_end - base);
      for (int j = 0; j < count; ++j) {
        const int page = __shfl_sync(~0u, page_id, j);
        const int row = (base + j) % a.tiles_per_page * kTileTokens;
        const int stage = ring.stage;
        ptx::mbarrier_wait(&shared.left_empty[stage], ring.parity ^ 1);
        if (lane < 2) ptx::mbarrier_arrive_expect_tx(&shared.kv_full[stage][lane], group_bytes);
        __syncwarp();
        if (lane < kHalfTiles) {
          ptx::tma_load_5d(shared.kv[stage][lane], &a.kv_map, &shared.kv_full[stage][lane / 2], 0,
                           row, lane, kv_head, page, ptx::kEvictFirst);
        }
        ptx::mbarrier_wait(&shared.right_empty[stage], ring.parity ^ 1);
        if (lane >= 2 && lane < kGroups)
          ptx::mbarrier_arrive_expect_tx(&shared.kv_full[stage][lane], group_bytes);
        __syncwarp();
        if (lane >= kHalfTiles && lane < kTiles) {
          const int group = min(lane / 2, kGroups - 1);
          ptx::tma_load_5d(shared.kv[stage][lane], &a.kv_map, &shared.kv_full[stage][group], 0, row,
                           lane, kv_head, page, ptx::kEvictFirst);
        }
        ring.advance();
      }
    }
  }
}

// Three warps; 72 of their threads own one 16-byte column each.
__device__ __forceinline__ void stream_queries(const DecodeArguments& a, DecodeShared& shared,
                                               int row_begin, int kv_head, int first, int last) {
  constexpr int kChunks = kWidth / 8;
  const int thread = threadIdx.x % 128 - 32;
  const int tile = thread / 8, chunk = thread % 8;
  const int rows = min(kTileRows, a.rows - row_begin);
  uint32_t parity = 0;
  for (int i = first; i < last; ++i) {
    const Item item(__ldg(a.items + i));
    if (item.pages() == 0) continue;
    ptx::mbarrier_wait(&shared.q_empty, parity ^ 1);
    if (thread < kChunks) {
      int head = row_begin % a.group;
      const auto* q = static_cast<const uint16_t*>(a.q) + item.request * a.q_batch_stride +
                      row_begin / a.group * a.q_token_stride +
                      (kv_head * a.group + head) * a.q_head_stride + thread * 8;
      const int64_t next_token = a.q_token_stride - (a.group - 1) * a.q_head_stride;
      for (int r = 0; r < rows; ++r) {
        ptx::copy_async_16(shared.q[tile] + r * 128 + ((chunk ^ (r % 8)) * 16), q);
        const bool wraps = ++head == a.group;
        if (wraps) head = 0;
        q += wraps ? next_token : a.q_head_stride;
      }
    }
    ptx::copy_async_wait_all();
    ptx::fence_async_proxy();
    ptx::mbarrier_arrive(&shared.q_full);
    parity ^= 1;
  }
}

// --- consumers ---

// Rows that this thread holds of a 64-row accumulator.
__device__ __forceinline__ int accumulator_row(int r) {
  return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * r;
}

// O [64, 256] of this warpgroup, columns from `column`, to the output or to the partial results.
template <typename Element>
__device__ __forceinline__ void store_output(const DecodeArguments& a, const Item& item,
                                             int kv_head, int row_begin, int column,
                                             const float (&o)[128], const float (&inverse_sum)[2]) {
  const int quad = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = row_begin + accumulator_row(r);
    const bool valid = row < a.rows;
    if (item.split >= 0) {
      if (!valid) continue;
      float* out =
          a.partial_out + partial_row(a, item.split, kv_head, row) * kLatent + column + 2 * quad;
#pragma unroll
      for (int n = 0; n < 32; ++n) {
        *reinterpret_cast<float2*>(out + 8 * n) =
            make_float2(o[4 * n + 2 * r] * inverse_sum[r], o[4 * n + 2 * r + 1] * inverse_sum[r]);
      }
      continue;
    }
    auto* out = static_cast<Element*>(a.out) +
                (valid ? output_row(a, item.request, kv_head, row) : 0) * kLatent + column +
                8 * quad;
#pragma unroll
    for (int n = 0; n < 32; n += 4) {
      uint32_t v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = 4 * (n + j) + 2 * r;
        v[j] = pack<Element>(o[i] * inverse_sum[r], o[i + 1] * inverse_sum[r]);
      }
      // Transpose 4 x 4 words over the quad: each thread then owns 16 contiguous bytes.
#pragma unroll
      for (int step = 1; step <= 2; step <<= 1) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (j & step) continue;
          const bool high = quad & step;
          const uint32_t received = __shfl_xor_sync(~0u, high ? v[j] : v[j + step], step);
          (high ? v[j] : v[j + step]) = received;
        }
      }
      if (valid) *reinterpret_cast<uint4*>(out + 8 * n) = make_uint4(v[0], v[1], v[2], v[3]);
    }
  }
}

// Out and LSE of a request without tokens; all 256 consumer threads.
template <typename Element>
__device__ __forceinline__ void store_empty(const DecodeArguments& a, const Item& item, int kv_head,
                                            int row_begin) {
  const int thread = threadIdx.x - 128;
  const int rows = min(kTileRows, a.rows - row_begin);
  for (int i = thread; i < rows * kLatent / 8; i += 256) {
    const int64_t row = output_row(a, item.request, kv_head, row_begin + i / (kLatent / 8));
    reinterpret_cast<uint4*>(static_cast<Element*>(a.out) + row * kLatent)[i % (kLatent / 8)] =
        uint4{};
  }
  if (thread < rows)
    a.lse[output_row(a, item.request, kv_head, row_begin + thread)] = kNegativeInfinity;
}

// S [64, 64] = Q K^T of one page, group by group as its tiles arrive.
template <typename Element>
__device__ __forceinline__ void start_scores(DecodeShared& shared, const RingPosition& ring,
                                             float (&scores)[32]) {
  const uint64_t q = ptx::matrix_descriptor(shared.q, 0);
  const uint64_t k = ptx::matrix_descriptor(shared.kv[ring.stage], 0);
  ptx::pin_registers(scores);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    ptx::mbarrier_wait(&shared.kv_full[ring.stage][group], ring.parity);
    ptx::wgmma_fence();
#pragma unroll
    for (int tile = group_begin(group); tile < group_begin(group + 1); ++tile) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint64_t offset = tile * ptx::kNextTile + step * ptx::kNextColumns16;
        ptx::mma<typename ptx::Wgmma<Element>::Scores>(q + offset, k + offset, scores,
                                                       tile + step > 0);
      }
    }
  }
  ptx::wgmma_commit();
}

__device__ __forceinline__ void rescale_output(float (&o)[128], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) o[i] *= factor[(i >> 1) & 1];
}

// Columns 16 k .. 16 k + 15 of P, as A-operand registers, into the page's rope tile.
__device__ __forceinline__ void store_probabilities(uint8_t* tile, int k, const uint32_t (&p)[4]) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const int row = warp * 16 + lane % 16, chunk = 2 * k + lane / 16;
  const uint32_t address = ptx::smem_address(tile + row * 128 + ((chunk ^ (row % 8)) * 16));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3])
               : "memory");
}

// Zeroes the V rows from `valid_rows` on of one half of a page, by the warpgroup that reads it:
// they may hold anything, NaN included, and 0 x NaN is NaN.
__device__ __forceinline__ void zero_tail(Tile* half, int valid_rows) {
  for (int i = threadIdx.x % 128; i < (kTileTokens - valid_rows) * kHalfTiles * 8; i += 128) {
    const int row = valid_rows + i / (kHalfTiles * 8), tile = i / 8 % kHalfTiles, chunk = i % 8;
    *reinterpret_cast<uint4*>(half[tile] + row * 128 + chunk * 16) = uint4{};
  }
  ptx::fence_async_proxy();
}

template <typename Element>
__device__ __forceinline__ void run_left(const DecodeArguments& a, DecodeShared& shared,
                                         int row_begin, int kv_head, int first, int last) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  RingPosition ring;
  uint32_t q_parity = 0;
  float o[128];
  float scores[32];
  uint32_t p[4][4];
  for (int i = first; i < last; ++i) {
    const Item item(__ldg(a.items + i));
    if (item.pages() == 0) {
      store_empty<Element>(a, item, kv_head, row_begin);
      continue;
    }
    const int length = __ldg(a.seq_lens + item.request);
    int limit[2];  // tokens that each of this thread's rows sees
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = min(row_begin + accumulator_row(r), a.rows - 1) / a.group;
      limit[r] = a.causal ? length - a.s_q + token + 1 : length;
    }
    OnlineSoftmax softmax;

    ptx::mbarrier_wait(&shared.q_full, q_parity);
    q_parity ^= 1;
    start_scores<Element>(shared, ring, scores);
    ptx::wgmma_wait<0>();
    ptx::pin_registers(scores);
    for (int page = item.page_begin; page < item.page_end; ++page) {
      const int stage = ring.stage;
      const bool final = page + 1 == item.page_end;
      if (final && lane == 0) ptx::mbarrier_arrive(&shared.q_empty);
      // A warp's wait speaks for its own part of S: P may overwrite the rope tile when all have
      // read it.
      ptx::named_barrier_sync(kLeftGroup, 128);

      const int visible[2] = {limit[0] - page * kTileTokens, limit[1] - page * kTileTokens};
      float rescale[2];
      const bool must_rescale = softmax.advance(scores, visible, a.scale_log2, rescale);
      if (must_rescale && page > item.page_begin) rescale_output(o, rescale);
      const int valid_rows = length - page * kTileTokens;
      if (valid_rows < kTileTokens) {
        zero_tail(shared.kv[stage], valid_rows);
        ptx::named_barrier_sync(kLeftGroup, 128);
      }

      // Each k step of P V starts while the next one's exponentials are computed.
      const uint64_t v = ptx::matrix_descriptor(shared.kv[stage], ptx::kTileBytes);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        softmax.exponentiate<Element>(scores, k, a.scale_log2, p[k]);
        ptx::wgmma_fence();
        ptx::mma<typename ptx::Wgmma<Element>::ValuesFromRegisters>(
            p[k], v + k * ptx::kNextRows16, o, k > 0 || page > item.page_begin);
        store_probabilities(shared.kv[stage][kRopeTile], k, p[k]);
      }
      ptx::wgmma_commit();

      // P and the factors go to the right side.
      if (final) softmax.finish();
      if (lane % 4 == 0) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          shared.rescale[stage][accumulator_row(r)] = rescale[r];
          if (final) shared.inverse_sum[stage][accumulator_row(r)] = softmax.inverse_sum(r);
        }
      }
      if (lane == 0) shared.must_rescale[stage][warp] = must_rescale;
      ptx::fence_async_proxy();
      ptx::named_barrier_arrive(kProbabilitiesReady + stage, 256);

      ring.advance();
      // Freed before S of the next page is issued: the refill takes longer than anything else.
      ptx::wgmma_wait<0>();
      ptx::pin_registers(o);
      if (lane == 0) ptx::mbarrier_arrive(&shared.left_empty[stage]);
      if (final) break;
      start_scores<Element>(shared, ring, scores);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(scores);
    }

    const float inverse_sum[2] = {softmax.inverse_sum(0), softmax.inverse_sum(1)};
    store_output<Element>(a, item, kv_head, row_begin, 0, o, inverse_sum);
    if (lane % 4 == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = row_begin + accumulator_row(r);
        if (row >= a.rows) continue;
        const float lse = softmax.log_sum(r, a.scale_log2);
        if (item.split >= 0) {
          a.partial_lse[partial_row(a, item.split, kv_head, row)] = lse;
        } else {
          a.lse[output_row(a, item.request, kv_head, row)] = lse;
        }
      }
    }
  }
}

// Not for the left half's groups: the left side may already have had them refilled, and a barrier
// that is two phases ahead looks like one that never completed.
__device__ __forceinline__ void wait_for_right_half(DecodeShared& shared,
                                                    const RingPosition& ring) {
#pragma unroll
  for (int group = kHalfTiles / 2; group < kGroups; ++group) {
    ptx::mbarrier_wait(&shared.kv_full[ring.stage][group], ring.parity);
  }
}

template <typename Element>
__device__ __forceinline__ void run_right(const DecodeArguments& a, DecodeShared& shared,
                                          int row_begin, int kv_head, int first, int last) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  RingPosition ring;
  float o[128];
  for (int i = first; i < last; ++i) {
    const Item item(__ldg(a.items + i));
    if (item.pages() == 0) {
      store_empty<Element>(a, item, kv_head, row_begin);
      continue;
    }
    const int length = __ldg(a.seq_lens + item.request);
    float inverse_sum[2];
    for (int page = item.page_begin; page < item.page_end; ++page) {
      wait_for_right_half(shared, ring);
      const int valid_rows = length - page * kTileTokens;
      if (valid_rows < kTileTokens) zero_tail(&shared.kv[ring.stage][kHalfTiles], valid_rows);
      ptx::named_barrier_sync(kProbabilitiesReady + ring.stage, 256);
      if (page > item.page_begin && shared.must_rescale[ring.stage][warp]) {
        const float factor[2] = {shared.rescale[ring.stage][accumulator_row(0)],
                                 shared.rescale[ring.stage][accumulator_row(1)]};
        rescale_output(o, factor);
      }
      // Only the last page's is meant; it must be read before the stage is released.
      inverse_sum[0] = shared.inverse_sum[ring.stage][accumulator_row(0)];
      inverse_sum[1] = shared.inverse_sum[ring.stage][accumulator_row(1)];
      uint64_t p = ptx::matrix_descriptor(shared.kv[ring.stage][kRopeTile], 0);
      uint64_t v = ptx::matrix_descriptor(shared.kv[ring.stage][kHalfTiles], ptx::kTileBytes);
      ptx::pin_registers(o);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        ptx::mma<typename ptx::Wgmma<Element>::ValuesFromShared>(p + k * ptx::kNextColumns16,
                                                                 v + k * ptx::kNextRows16, o,
                                                                 k > 0 || page > item.page_begin);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::pin_registers(o);
      if (lane == 0) ptx::mbarrier_arrive(&shared.right_empty[ring.stage]);
      ring.advance();
    }
    store_output<Element>(a, item, kv_head, row_begin, kLatent / 2, o, inverse_sum);
  }
}

// --- kernel ---

// grid: (row tiles, H_kv, parts), so that neighbours read the same pages at the same time.
template <typename Element>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeArguments a) {
  extern __shared__ uint8_t raw_shared[];
  // An offset, not a rounded pointer: the compiler must see that this is shared memory.
  const uint32_t padding = -ptx::smem_address(raw_shared) & 1023;
  auto& shared = *reinterpret_cast<DecodeShared*>(raw_shared + padding);
  const int row_begin = blockIdx.x * kTileRows, kv_head = blockIdx.y, part = blockIdx.z;

  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&a.kv_map);
    ptx::mbarrier_init(&shared.q_full, 96);
    ptx::mbarrier_init(&shared.q_empty, 4);
    for (int stage = 0; stage < kStages; ++stage) {
      for (int group = 0; group < kGroups; ++group) {
        ptx::mbarrier_init(&shared.kv_full[stage][group], 1);
      }
      ptx::mbarrier_init(&shared.left_empty[stage], 4);
      ptx::mbarrier_init(&shared.right_empty[stage], 4);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  const int first = __ldg(a.part_offsets + part), last = __ldg(a.part_offsets + part + 1);

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::register_decrease<kProducerRegisters>();
    if (threadIdx.x < 32) {
      stream_pages(a, shared, kv_head, first, last);
    } else {
      stream_queries(a, shared, row_begin, kv_head, first, last);
    }
  } else if (warpgroup == 1) {
    ptx::register_increase<kConsumerRegisters>();
    run_left<Element>(a, shared, row_begin, kv_head, first, last);
  } else {
    ptx::register_increase<kConsumerRegisters>();
    run_right<Element>(a, shared, row_begin, kv_head, first, last);
  }
}

}  // namespace flashmla
