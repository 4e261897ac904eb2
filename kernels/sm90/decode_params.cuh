// What the decode and combine kernels are told; a by-value kernel argument.
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "flashmla/decode.h"
#include "sm90/ptx/order.cuh"

namespace flashmla {

constexpr int kLatent = 512;
constexpr int kRowHalves = 2;  // as O is kept, each one warpgroup's
constexpr int kWidth = 576;
constexpr int kTileRows = 64;   // query rows of a thread block
constexpr int kDealtRows = 32;  // at most that are dealt to all warps of a tile
constexpr int kFewRows = 16;    // at most for which free mode has a kernel of its own

// Whether that computes the partial results of so many rows, which says where columns lie in them.
__host__ __device__ constexpr bool has_few_rows(int rows) { return rows <= kFewRows; }
constexpr int kTileLog2 = 6;
constexpr int kTileTokens = 1 << kTileLog2;  // KV tokens of a page as the schedule counts them
constexpr int kTiles = kWidth / 64;

// None of a length that is negative.
__device__ __forceinline__ int pages_of(int tokens) {
  return ((max(tokens, 0) - 1) >> kTileLog2) + 1;
}

// Beside a row of a partial result, the fp16 values of which are to be multiplied by the scale of
// their half: a power of two, of which the upper half of a float is kept.
struct alignas(8) PartialState {
  float lse;
  uint16_t scale[2];
};

// Division of 0 .. 2^31 - 1 by a number that the host knows, as a product (Granlund and Montgomery,
// "Division by Invariant Integers using Multiplication"): the machine's own takes some forty
// instructions, which short calls feel.
struct Divisor {
  uint32_t divisor, multiplier, shift;

  Divisor() = default;
  explicit Divisor(int number) : divisor(number), shift(31) {
    while (1u << (shift - 31) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }
  __device__ __forceinline__ int divide(int x) const {
    return static_cast<int>(static_cast<uint64_t>(x) * multiplier >> shift);
  }
  __device__ __forceinline__ int remainder(int x) const {
    return x - divide(x) * static_cast<int>(divisor);
  }
};

struct DecodeArguments {
  CUtensorMap kv_map;  // dimensions: 64 columns, page_size rows, 9 column tiles, H_kv heads, pages
  flashmla_query q_latent, q_rope;
  const int32_t* seq_lens;
  const int32_t* block_table;
  int64_t block_table_stride;
  const int4* items;
  const int32_t* part_offsets;
  const int32_t* split_offsets;
  const int32_t* planned_lens;  // null unless lengths are checked
  flashmla_fault_box* faults;
  void* out;
  float* lse;
  __half* partial_out;
  PartialState* partial_lse;
  uint8_t* rooms;
  int batch, s_q, h_q, h_kv;  // s_q: query tokens of a request, or the most of any
  int rows;                   // s_q * h_q / h_kv
  Divisor group;              // h_q / h_kv
  Divisor head_rows;          // rows, of one KV head
  Divisor all_rows;           // h_kv * rows
  Divisor tiles_per_page;     // page_size / 64, 1 where pages are smaller
  int max_leaves;             // 0: not batch-invariant
  bool causal;
  float scale_log2;  // softmax scale * log2(e)
  int box_log2;      // a TMA box holds 2^box_log2 tokens of a page: 64, or a smaller page
  const int32_t* query_offsets;  // null unless requests differ in their query tokens
};

// Has the constant cache fetch all arguments at once: later the first look at each 64 bytes would
// wait for them.
__device__ __forceinline__ void fetch_arguments(const DecodeArguments& a) {
  const auto* const words = reinterpret_cast<const uint32_t*>(&a);
  uint32_t all = 0;
#pragma unroll
  for (size_t i = sizeof(CUtensorMap) / 4; i < sizeof(DecodeArguments) / 4; i += 16)
    all ^= words[i];
  if (all == 1) ptx::use_pointer(a.items);  // hardly ever so, and without effect
}

// kRagged: requests differ in their query tokens, which lie one after the other, without padding.
// Row tiles are of the most that any has; rows past a request's own are computed as its last one,
// since nothing of others may be in a tile, and stored nowhere.

// Query tokens of a request.
template <bool kRagged>
__device__ __forceinline__ int request_queries(const DecodeArguments& a, int request) {
  if constexpr (!kRagged) return a.s_q;
  return __ldg(a.query_offsets + request + 1) - __ldg(a.query_offsets + request);
}

// Query rows of a request and KV head.
template <bool kRagged>
__device__ __forceinline__ int request_rows(const DecodeArguments& a, int request) {
  if constexpr (!kRagged) return a.rows;
  return request_queries<kRagged>(a, request) * static_cast<int>(a.group.divisor);
}

// Offset of row `row` of KV head `kv_head` in [B, S_q, H_q], or in [T, H_q].
template <bool kRagged>
__device__ __forceinline__ int64_t output_row(const DecodeArguments& a, int request, int kv_head,
                                              int row) {
  const int token = a.group.divide(row), head = a.group.remainder(row), group = a.group.divisor;
  int64_t first;
  if constexpr (kRagged) {
    first = __ldg(a.query_offsets + request);
  } else {
    first = static_cast<int64_t>(request) * a.s_q;
  }
  return (first + token) * a.h_q + kv_head * group + head;
}

// Offset of the same row in [splits, H_kv, rows]; without a sign, which would take a register.
__device__ __forceinline__ int64_t partial_row(const DecodeArguments& a, int split, int kv_head,
                                               int row) {
  return (static_cast<int64_t>(split) * a.h_kv + kv_head) * a.rows + static_cast<uint32_t>(row);
}

}  // namespace flashmla
