// MLA decode as a textbook would write it. Each thread block answers one query row: scores of a
// chunk of tokens into shared memory, softmax there, then the weighted sum of V; long requests take
// several chunks with an online softmax. Every row reads the whole cache of its request by itself.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "flashmla/decode.h"

namespace flashmla::naive {

constexpr int kLatent = 512;
constexpr int kWidth = 576;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kChunkTokens = 1024;
static_assert(2 * kThreads == kLatent, "a thread owns two output columns");

__device__ __forceinline__ float2 to_float2(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ __forceinline__ float2 to_float2(__half2 x) { return __half22float2(x); }

__device__ __forceinline__ void store(__nv_bfloat162* out, float2 x) {
  *out = __float22bfloat162_rn(x);
}
__device__ __forceinline__ void store(__half2* out, float2 x) { *out = __float22half2_rn(x); }

struct Maximum {
  static constexpr float kIdentity = -__builtin_huge_valf();
  __device__ float operator()(float x, float y) const { return fmaxf(x, y); }
};

struct Sum {
  static constexpr float kIdentity = 0.0f;
  __device__ float operator()(float x, float y) const { return x + y; }
};

template <typename Combine>
__device__ __forceinline__ float reduce_warp(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x = Combine{}(x, __shfl_xor_sync(~0u, x, offset));
  return x;
}

// Over the thread block; everyone gets the result.
template <typename Combine>
__device__ __forceinline__ float reduce_block(float x, float (&scratch)[kWarps]) {
  x = reduce_warp<Combine>(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float result = Combine::kIdentity;
  for (int warp = 0; warp < kWarps; ++warp) result = Combine{}(result, scratch[warp]);
  __syncthreads();
  return result;
}

// grid: rows of out, [B, S_q, H_q] in order. Pair: __nv_bfloat162 or __half2.
template <typename Pair>
__global__ void __launch_bounds__(kThreads) naive_decode_kernel(const flashmla_decode_params p) {
  __shared__ float2 query[kWidth / 2];
  __shared__ float scores[kChunkTokens];
  __shared__ const Pair* token_rows[kChunkTokens];
  __shared__ float scratch[kWarps];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

  const int row = blockIdx.x;
  const int head = row % p.h_q, query_token = row / p.h_q % p.s_q, request = row / p.h_q / p.s_q;
  const int kv_head = head / (p.h_q / p.h_kv);
  const int length = p.seq_lens[request];
  const int visible = p.causal ? max(0, length - p.s_q + query_token + 1) : length;

  const auto query_pairs = [&](const flashmla_query& q) {
    return reinterpret_cast<const Pair*>(static_cast<const uint16_t*>(q.data) +
                                         request * q.batch_stride + query_token * q.token_stride +
                                         head * q.head_stride);
  };
  const Pair *latent = query_pairs(p.q_latent), *rope = query_pairs(p.q_rope);
  for (int i = thread; i < kWidth / 2; i += kThreads)
    query[i] = to_float2(i < kLatent / 2 ? latent[i] : rope[i - kLatent / 2]);

  float maximum = Maximum::kIdentity, sum = 0.0f;
  float2 out = {0.0f, 0.0f};  // columns 2 thread, 2 thread + 1
  for (int begin = 0; begin < visible; begin += kChunkTokens) {
    const int tokens = min(kChunkTokens, visible - begin);
    for (int i = thread; i < tokens; i += kThreads) {
      const int token = begin + i;
      const int64_t page = p.block_table[request * p.block_table_stride + token / p.page_size];
      token_rows[i] = reinterpret_cast<const Pair*>(
          static_cast<const uint16_t*>(p.kv) + page * p.kv_page_stride +
          token % p.page_size * p.kv_row_stride + kv_head * p.kv_head_stride);
    }
    __syncthreads();

    float chunk_maximum = Maximum::kIdentity;
    for (int i = warp; i < tokens; i += kWarps) {
      float dot = 0.0f;
      for (int column = lane; column < kWidth / 2; column += 32) {
        const float2 k = to_float2(token_rows[i][column]);
        dot += query[column].x * k.x + query[column].y * k.y;
      }
      dot = reduce_warp<Sum>(dot) * p.softmax_scale;
      chunk_maximum = fmaxf(chunk_maximum, dot);
      if (lane == 0) scores[i] = dot;
    }
    const float next = fmaxf(maximum, reduce_block<Maximum>(chunk_maximum, scratch));

    float chunk_sum = 0.0f;
    for (int i = thread; i < tokens; i += kThreads) {
      scores[i] = expf(scores[i] - next);
      chunk_sum += scores[i];
    }
    const float rescale = expf(maximum - next);
    sum = sum * rescale + reduce_block<Sum>(chunk_sum, scratch);
    maximum = next;

    out.x *= rescale;
    out.y *= rescale;
    for (int i = 0; i < tokens; ++i) {
      const float2 v = to_float2(token_rows[i][thread]);
      out.x += scores[i] * v.x;
      out.y += scores[i] * v.y;
    }
    __syncthreads();  // before the next chunk takes the shared memory
  }

  const float inverse = visible > 0 ? 1.0f / sum : 0.0f;
  store(static_cast<Pair*>(p.out) + int64_t{row} * (kLatent / 2) + thread,
        {out.x * inverse, out.y * inverse});
  if (thread == 0) p.lse[row] = visible > 0 ? maximum + logf(sum) : Maximum::kIdentity;
}

}  // namespace flashmla::naive
