// Split-KV decode: one thread block per (64-row tile, KV head, part), persistent over the part's
// work items.
//
//   producer    warp 0 streams the left half of each page's latent columns and its rope columns,
//               warp 1 the right half (TMA), through rings that carry on across work items;
//               warps 2-3 load the valid rows of Q (cp.async) as soon as the previous item has read
//               its own
//   left        S = Q K^T, softmax, P to registers and shared memory, O[:, :256] += P V
//   right       O[:, 256:] += P V with P from shared memory, while the left side is at the next
//               page's softmax: so the tensor cores have work then
//
// That takes a third buffer for right halves; its room are three column tiles of Q that the left
// side keeps in registers. P of a page takes the place of its rope columns, which nobody reads
// after S.
#pragma once

#include "sm90/decode_params.cuh"
#include "sm90/ptx/copy.cuh"
#include "sm90/ptx/mbarrier.cuh"
#include "sm90/ptx/sync.cuh"
#include "sm90/ptx/wgmma.cuh"
#include "sm90/softmax.cuh"

namespace flashmla {

constexpr int kThreads = 384;
constexpr int kLeftStages = 2;
constexpr int kRightStages = 3;
constexpr int kHalfTiles = 4;      // column tiles of half a latent
constexpr int kRopeTile = kTiles - 1;
constexpr int kRegisterTiles = 3;  // of Q: the last latent ones
constexpr int kFirstRegisterTile = kRopeTile - kRegisterTiles;
constexpr int kProducerRegisters = 56;
constexpr int kLeftRegisters = 248;
constexpr int kRightRegisters = 200;
static_assert(kProducerRegisters + kLeftRegisters + kRightRegisters == 3 * 168, "as launched");

using Tile = uint8_t[ptx::kTileBytes];

struct DecodeShared {
  alignas(1024) Tile q[kTiles - kRegisterTiles];  // the last one is rope
  alignas(1024) Tile left[kLeftStages][kHalfTiles];
  alignas(1024) Tile right[kRightStages][kHalfTiles];
  alignas(1024) Tile rope[kLeftStages];   // becomes P
  float rescale[kLeftStages][kTileRows];  // factor of O before this page's P V
  float inverse_sum[kLeftStages][kTileRows];
  bool must_rescale[kLeftStages][4];  // by warp
  ptx::Mbarrier q_full, q_empty;
  // Each half of a page arrives in two pairs of tiles, so that S starts before it is complete.
  ptx::Mbarrier left_full[kLeftStages][2], left_empty[kLeftStages];
  ptx::Mbarrier right_full[kRightStages][2], right_empty[kRightStages];
  ptx::Mbarrier rope_full[kLeftStages], rope_empty[kLeftStages];
  ptx::Mbarrier p_full[kLeftStages];
};
static_assert(sizeof(DecodeShared) + 1024 <= 232448, "shared memory of an SM");

enum Barrier : int { kLeftGroup = 1, kRightGroup };  // named barriers; 0 is __syncthreads

template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Item {
  int request, page_begin, page_end, split;
  __device__ __forceinline__ explicit Item(int4 v)
      : request(v.x), page_begin(v.y), page_end(v.z), split(v.w) {}
  __device__ __forceinline__ int pages() const { return page_end - page_begin; }
};

// --- producer ---

// Calls load(page id, first row in the page) for every page of the items; a warp together.
template <typename Load>
__device__ __forceinline__ void for_each_page(const DecodeArguments& a, int first, int last,
                                              Load load) {
  for (int i = first; i < last; ++i) {
    const Item item(__ldg(a.items + i));
    const int32_t* table = a.block_table + item.request * a.block_table_stride;
    for (int base = item.page_begin; base < item.page_end; base += 32) {
      // Every lane looks up one page, so that table reads are a thirty-second of the waits.
      const int own = base + threadIdx.x % 32;
      const int page_id = own < item.page_end ? __ldg(table + own / a.tiles_per_page) : 0;
      const int count = min(32, item.page_end - base);
      for (int j = 0; j < count; ++j) {
        load(__shfl_sync(~0u, page_id, j), (base + j) % a.tiles_per_page * kTileTokens);
      }
    }
  }
}

__device__ __forceinline__ void load_tile(const DecodeArguments& a, void* destination,
                                          ptx::Mbarrier* barrier, int kv_head, int page, int row,
                                          int tile) {
  ptx::tma_load_5d(destination, &a.kv_map, barrier, 0, row, tile, kv_head, page, ptx::kEvictFirst);
}

__device__ __forceinline__ void stream_left(const DecodeArguments& a, DecodeShared& shared,
                                            int kv_head, int first, int last) {
  const int lane = threadIdx.x % 32;
  Ring<kLeftStages> ring;
  for_each_page(a, first, last, [&](int page, int row) {
    const int stage = ring.stage;
    ptx::mbarrier_wait(&shared.left_empty[stage], ring.parity ^ 1);
    if (lane < 2)
      ptx::mbarrier_arrive_expect_tx(&shared.left_full[stage][lane], 2 * ptx::kTileBytes);
    __syncwarp();
    if (lane < kHalfTiles)
      load_tile(a, shared.left[stage][lane], &shared.left_full[stage][lane / 2], kv_head, page, row,
                lane);
    ptx::mbarrier_wait(&shared.rope_empty[stage], ring.parity ^ 1);
    if (lane == 0) {
      ptx::mbarrier_arrive_expect_tx(&shared.rope_full[stage], ptx::kTileBytes);
      load_tile(a, shared.rope[stage], &shared.rope_full[stage], kv_head, page, row, kRopeTile);
    }
    ring.advance();
  });
}

__device__ __forceinline__ void stream_right(const DecodeArguments& a, DecodeShared& shared,
                                             int kv_head, int first, int last) {
  const int lane = threadIdx.x % 32;
  Ring<kRightStages> ring;
  for_each_page(a, first, last, [&](int page, int row) {
    const int stage = ring.stage;
    ptx::mbarrier_wait(&shared.right_empty[stage], ring.parity ^ 1);
    if (lane < 2)
      ptx::mbarrier_arrive_expect_tx(&shared.right_full[stage][lane], 2 * ptx::kTileBytes);
    __syncwarp();
    if (lane < kHalfTiles)
      load_tile(a, shared.right[stage][lane], &shared.right_full[stage][lane / 2], kv_head, page,
                row, kHalfTiles + lane);
    ring.advance();
  });
}

// Q of row `row` of this KV head.
__device__ __forceinline__ const uint16_t* query_row(const DecodeArguments& a, int request,
                                                     int kv_head, int row) {
  return static_cast<const uint16_t*>(a.q) + request * a.q_batch_stride +
         row / a.group * a.q_token_stride + (kv_head * a.group + row % a.group) * a.q_head_stride;
}

// Two warps; 48 of their threads own one 16-byte column of the tiles in shared memory each.
__device__ __forceinline__ void stream_queries(const DecodeArguments& a, DecodeShared& shared,
                                               int row_begin, int kv_head, int first, int last) {
  const int thread = threadIdx.x % 128 - 64;
  const int slot = thread / 8, chunk = thread % 8;
  const int tile = slot == kFirstRegisterTile ? kRopeTile : slot;
  const int rows = min(kTileRows, a.rows - row_begin);
  uint32_t parity = 0;
  for (int i = first; i < last; ++i) {
    const Item item(__ldg(a.items + i));
    if (item.pages() == 0) continue;
    ptx::mbarrier_wait(&shared.q_empty, parity ^ 1);
    if (slot < kTiles - kRegisterTiles) {
      int head = row_begin % a.group;
      const uint16_t* q =
          query_row(a, item.request, kv_head, row_begin) + tile * 64 + chunk * 8;
      const int64_t next_token = a.q_token_stride - (a.group - 1) * a.q_head_stride;
      for (int r = 0; r < rows; ++r) {
        ptx::copy_async_16(shared.q[slot] + r * 128 + ((chunk ^ (r % 8)) * 16), q);
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

// Word j of thread i goes to word i of thread j, among the four threads of a quad.
__device__ __forceinline__ void transpose_quad(uint32_t (&v)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; step <<= 1) {
    const bool high = threadIdx.x & step;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & step) continue;
      const uint32_t received = __shfl_xor_sync(~0u, high ? v[j] : v[j + step], step);
      (high ? v[j] : v[j + step]) = received;
    }
  }
}

__device__ __forceinline__ void pin_words(uint32_t (&v)[4][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(v[i / 4][i % 4]));
}

// One row of O, 256 columns from `column` on: this thread's o[4 n + 2 r + {0, 1}] are columns
// 8 n + 2 (lane % 4) + {0, 1}. All values of a batch are ready before its first store, or each
// store would wait for the registers of the one before.
template <typename Element>
__device__ __forceinline__ void store_row(Element* out, bool valid, int r, const float (&o)[128],
                                          float inverse_sum) {
  const int quad = threadIdx.x % 4;
#pragma unroll
  for (int batch = 0; batch < 32; batch += 16) {
    uint32_t v[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int x = 4 * (batch + 4 * i + j) + 2 * r;
        v[i][j] = pack<Element>(o[x] * inverse_sum, o[x + 1] * inverse_sum);
      }
      transpose_quad(v[i]);  // each thread then owns 16 contiguous bytes
    }
    pin_words(v);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (valid)
        *reinterpret_cast<uint4*>(out + 8 * (batch + 4 * i + quad)) =
            make_uint4(v[i][0], v[i][1], v[i][2], v[i][3]);
    }
  }
}

template <>
__device__ __forceinline__ void store_row(float* out, bool valid, int r, const float (&o)[128],
                                          float inverse_sum) {
  const int quad = threadIdx.x % 4;
  const bool odd = quad & 1;
#pragma unroll
  for (int batch = 0; batch < 32; batch += 8) {
    uint32_t v[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Neighbours exchange pairs of columns: each thread then owns 16 contiguous bytes.
      const int x = 4 * (batch + 2 * i) + 2 * r;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float here = o[x + j], there = o[x + j + 4];
        const float got = __shfl_xor_sync(~0u, odd ? here : there, 1) * inverse_sum;
        const float own = (odd ? there : here) * inverse_sum;
        v[i][j] = __float_as_uint(odd ? got : own);
        v[i][j + 2] = __float_as_uint(odd ? own : got);
      }
    }
    pin_words(v);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (valid)
        *reinterpret_cast<uint4*>(out + 8 * (batch + 2 * i + odd) + 4 * (quad / 2)) =
            make_uint4(v[i][0], v[i][1], v[i][2], v[i][3]);
    }
  }
}

// O [64, 256] of this warpgroup, columns from `column`, to the output or to the partial results.
template <typename Element>
__device__ __forceinline__ void store_output(const DecodeArguments& a, const Item& item,
                                             int kv_head, int row_begin, int column,
                                             const float (&o)[128], const float (&inverse_sum)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = min(row_begin + accumulator_row(r), a.rows - 1);
    const bool valid = row_begin + accumulator_row(r) < a.rows;
    if (item.split >= 0) {
      store_row(a.partial_out + partial_row(a, item.split, kv_head, row) * kLatent + column, valid,
                r, o, inverse_sum[r]);
    } else {
      store_row(static_cast<Element*>(a.out) +
                    output_row(a, item.request, kv_head, row) * kLatent + column,
                valid, r, o, inverse_sum[r]);
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

// Tiles of Q as A operands of wgmma: 16 columns each of this thread's two rows.
using QueryRegisters = uint32_t[kRegisterTiles][4][4];

// Each thread loads whole 16-byte vectors, every fourth of its two rows; see arrange.
__device__ __forceinline__ void load_query_registers(const DecodeArguments& a, int request,
                                                     int kv_head, int row_begin,
                                                     QueryRegisters& q) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = min(row_begin + accumulator_row(r), a.rows - 1);
    const auto* source = reinterpret_cast<const uint4*>(query_row(a, request, kv_head, row)) +
                         kFirstRegisterTile * 8 + threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2 * kRegisterTiles; ++i) {
      const uint4 v = __ldg(source + 4 * i);
      uint32_t(&vector)[4] = q[i / 2][i % 2 * 2 + r];
      vector[0] = v.x, vector[1] = v.y, vector[2] = v.z, vector[3] = v.w;
    }
  }
}

// Gives each thread of a quad the columns that wgmma wants from it: word `lane % 4` of each vector.
__device__ __forceinline__ void arrange_query_registers(QueryRegisters& q) {
#pragma unroll
  for (int i = 0; i < 2 * kRegisterTiles; ++i) {
    uint32_t(&x)[4] = q[i / 2][i % 2 * 2];
    uint32_t(&y)[4] = q[i / 2][i % 2 * 2 + 1];
    transpose_quad(x);
    transpose_quad(y);
    const uint32_t even[4] = {x[0], y[0], x[1], y[1]}, odd[4] = {x[2], y[2], x[3], y[3]};
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = even[j], y[j] = odd[j];
  }
}

// S [64, 64] = Q K^T of one page, a pair of tiles after the other as they arrive.
template <typename Element>
__device__ __forceinline__ void start_scores(DecodeShared& shared, const Ring<kLeftStages>& left,
                                             const Ring<kRightStages>& right,
                                             const QueryRegisters& q_registers,
                                             float (&scores)[32]) {
  using FromShared = typename ptx::Wgmma<Element>::Scores;
  using FromRegisters = typename ptx::Wgmma<Element>::ScoresFromRegisters;
  const uint64_t q = ptx::matrix_descriptor(shared.q, 0);
  const uint64_t left_k = ptx::matrix_descriptor(shared.left[left.stage], 0);
  const uint64_t right_k = ptx::matrix_descriptor(shared.right[right.stage], 0);
  const uint64_t rope_k = ptx::matrix_descriptor(shared.rope[left.stage], 0);
  ptx::pin_registers(scores);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile == kRopeTile) {
      ptx::mbarrier_wait(&shared.rope_full[left.stage], left.parity);
    } else if (tile >= kHalfTiles && tile % 2 == 0) {
      ptx::mbarrier_wait(&shared.right_full[right.stage][(tile - kHalfTiles) / 2], right.parity);
    } else if (tile % 2 == 0) {
      ptx::mbarrier_wait(&shared.left_full[left.stage][tile / 2], left.parity);
    }
    if (tile % 2 == 0) ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint64_t k = tile == kRopeTile    ? rope_k
                         : tile >= kHalfTiles ? right_k + (tile - kHalfTiles) * ptx::kNextTile
                                              : left_k + tile * ptx::kNextTile;
      const uint64_t columns = step * ptx::kNextColumns16;
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

// P and the factors of a page, written by this warp and fenced, are the right side's from now on.
__device__ __forceinline__ void hand_over(ptx::Mbarrier* p_full) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(p_full);
}

template <typename Element>
__device__ __forceinline__ void run_left(const DecodeArguments& a, DecodeShared& shared,
                                         int row_begin, int kv_head, int first, int last) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  Ring<kLeftStages> ring;
  Ring<kRightStages> right_ring;
  uint32_t q_parity = 0;
  float o[128];
  float scores[32];
  uint32_t p[4][4];
  QueryRegisters q_registers;
  if (first < last)
    load_query_registers(a, Item(__ldg(a.items + first)).request, kv_head, row_begin, q_registers);
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

    arrange_query_registers(q_registers);
    ptx::mbarrier_wait(&shared.q_full, q_parity);
    q_parity ^= 1;
    start_scores<Element>(shared, ring, right_ring, q_registers, scores);
    ptx::wgmma_wait<0>();
    ptx::pin_registers(scores);
    for (int page = item.page_begin; page < item.page_end; ++page) {
      const int stage = ring.stage;
      const bool final = page + 1 == item.page_end;
      // The right side takes up the previous page now that S no longer needs the tensor cores.
      if (page > item.page_begin) hand_over(&shared.p_full[stage ^ 1]);
      if (final) {
        if (lane == 0) ptx::mbarrier_arrive(&shared.q_empty);
        // Costliest items come first: after this one no empty one precedes another with pages.
        if (i + 1 < last)
          load_query_registers(a, Item(__ldg(a.items + i + 1)).request, kv_head, row_begin,
                               q_registers);
      }
      // A warp's wait speaks for its own part of S: P may overwrite the rope tile when all have
      // read it.
      ptx::named_barrier_sync(kLeftGroup, 128);

      const int visible[2] = {limit[0] - page * kTileTokens, limit[1] - page * kTileTokens};
      float rescale[2];
      const bool must_rescale = softmax.advance(scores, visible, a.scale_log2, rescale);
      if (must_rescale && page > item.page_begin) rescale_output(o, rescale);
      const int valid_rows = length - page * kTileTokens;
      if (valid_rows < kTileTokens) {
        zero_tail(shared.left[stage], valid_rows);
        ptx::named_barrier_sync(kLeftGroup, 128);
      }

      // Each k step of P V starts while the next one's exponentials are computed.
      const uint64_t v = ptx::matrix_descriptor(shared.left[stage], ptx::kTileBytes);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        softmax.exponentiate<Element>(scores, k, a.scale_log2, p[k]);
        ptx::wgmma_fence();
        ptx::mma<typename ptx::Wgmma<Element>::ValuesFromRegisters>(
            p[k], v + k * ptx::kNextRows16, o, k > 0 || page > item.page_begin);
        store_probabilities(shared.rope[stage], k, p[k]);
      }
      ptx::wgmma_commit();

      if (lane == 0) shared.must_rescale[stage][warp] = must_rescale;
      if (must_rescale && lane % 4 == 0) {
        shared.rescale[stage][accumulator_row(0)] = rescale[0];
        shared.rescale[stage][accumulator_row(1)] = rescale[1];
      }
      if (final) {
        softmax.finish();
        if (lane % 4 == 0) {
          shared.inverse_sum[stage][accumulator_row(0)] = softmax.inverse_sum(0);
          shared.inverse_sum[stage][accumulator_row(1)] = softmax.inverse_sum(1);
        }
      }
      ptx::fence_async_proxy();
      if (final) hand_over(&shared.p_full[stage]);

      ring.advance();
      right_ring.advance();
      // Freed before S of the next page is issued: the refill takes longer than anything else.
      ptx::wgmma_wait<0>();
      ptx::pin_registers(o);
      if (lane == 0) ptx::mbarrier_arrive(&shared.left_empty[stage]);
      if (final) break;
      start_scores<Element>(shared, ring, right_ring, q_registers, scores);
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

template <typename Element>
__device__ __forceinline__ void run_right(const DecodeArguments& a, DecodeShared& shared,
                                          int row_begin, int kv_head, int first, int last) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  Ring<kRightStages> ring;
  Ring<kLeftStages> p_ring;
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
      for (int pair = 0; pair < 2; ++pair) {
        ptx::mbarrier_wait(&shared.right_full[ring.stage][pair], ring.parity);
      }
      const int valid_rows = length - page * kTileTokens;
      if (valid_rows < kTileTokens) {
        zero_tail(shared.right[ring.stage], valid_rows);
        ptx::named_barrier_sync(kRightGroup, 128);
      }
      ptx::mbarrier_wait(&shared.p_full[p_ring.stage], p_ring.parity);
      if (page > item.page_begin && shared.must_rescale[p_ring.stage][warp]) {
        const float factor[2] = {shared.rescale[p_ring.stage][accumulator_row(0)],
                                 shared.rescale[p_ring.stage][accumulator_row(1)]};
        rescale_output(o, factor);
      }
      uint64_t p = ptx::matrix_descriptor(shared.rope[p_ring.stage], 0);
      uint64_t v = ptx::matrix_descriptor(shared.right[ring.stage], ptx::kTileBytes);
      ptx::pin_registers(o);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        ptx::mma<typename ptx::Wgmma<Element>::ValuesFromShared>(p + k * ptx::kNextColumns16,
                                                                 v + k * ptx::kNextRows16, o,
                                                                 k > 0 || page > item.page_begin);
      }
      ptx::wgmma_commit();
      if (page + 1 == item.page_end) {  // before the stage is released
        inverse_sum[0] = shared.inverse_sum[p_ring.stage][accumulator_row(0)];
        inverse_sum[1] = shared.inverse_sum[p_ring.stage][accumulator_row(1)];
      }
      ptx::wgmma_wait<0>();
      ptx::pin_registers(o);
      if (lane == 0) {
        ptx::mbarrier_arrive(&shared.rope_empty[p_ring.stage]);
        ptx::mbarrier_arrive(&shared.right_empty[ring.stage]);
      }
      ring.advance();
      p_ring.advance();
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
    ptx::mbarrier_init(&shared.q_full, 64);
    ptx::mbarrier_init(&shared.q_empty, 4);
    for (int stage = 0; stage < kLeftStages; ++stage) {
      for (int pair = 0; pair < 2; ++pair) ptx::mbarrier_init(&shared.left_full[stage][pair], 1);
      ptx::mbarrier_init(&shared.left_empty[stage], 4);
      ptx::mbarrier_init(&shared.rope_full[stage], 1);
      ptx::mbarrier_init(&shared.rope_empty[stage], 4);
      ptx::mbarrier_init(&shared.p_full[stage], 4);
    }
    for (int stage = 0; stage < kRightStages; ++stage) {
      for (int pair = 0; pair < 2; ++pair) ptx::mbarrier_init(&shared.right_full[stage][pair], 1);
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
      stream_left(a, shared, kv_head, first, last);
    } else if (threadIdx.x < 64) {
      stream_right(a, shared, kv_head, first, last);
    } else {
      stream_queries(a, shared, row_begin, kv_head, first, last);
    }
  } else if (warpgroup == 1) {
    ptx::register_increase<kLeftRegisters>();
    run_left<Element>(a, shared, row_begin, kv_head, first, last);
  } else {
    ptx::register_increase<kRightRegisters>();
    run_right<Element>(a, shared, row_begin, kv_head, first, last);
  }
}

}  // namespace flashmla
