// Merges the partial results of requests that were cut:
// out = sum_i exp(lse_i - lse) out_i, lse = log sum_i exp(lse_i).
#pragma once

#include "sm90/decode_params.cuh"
#include "sm90/ptx/sync.cuh"
#include "sm90/softmax.cuh"

namespace flashmla {

constexpr int kCombineWarps = 8;
constexpr int kCombineThreads = 32 * kCombineWarps;
constexpr int kFewSplits = 8;  // up to here one warp merges a row alone

// A running sum of weighted partial results; a lane holds columns 128 v + 4 lane + {0 .. 3} of one
// row.
struct Merge {
  static constexpr int kVectors = kLatent / 128;
  float maximum = kNegativeInfinity, sum = 0.0f;
  float4 out[kVectors] = {};

  __device__ __forceinline__ void add(const float4 (&x)[kVectors], float lse) {
    // A piece that holds no token this row sees has lse -inf: it weighs nothing, whatever its `x`.
    if (lse == kNegativeInfinity) return;
    const float next = fmaxf(maximum, lse);
    const float old_weight = __expf(maximum - next), weight = __expf(lse - next);
    maximum = next;
    sum = sum * old_weight + weight;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      out[v].x = out[v].x * old_weight + x[v].x * weight;
      out[v].y = out[v].y * old_weight + x[v].y * weight;
      out[v].z = out[v].z * old_weight + x[v].z * weight;
      out[v].w = out[v].w * old_weight + x[v].w * weight;
    }
  }

  // Splits first, first + step, .. of a row.
  __device__ __forceinline__ void add_splits(const DecodeArguments& a, int kv_head, int row,
                                             int first, int last, int step) {
    const int lane = threadIdx.x % 32;
#pragma unroll 4
    for (int split = first; split < last; split += step) {
      const int64_t source = partial_row(a, split, kv_head, row);
      const float lse = __ldcs(a.partial_lse + source);
      float4 x[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        x[v] = __ldcs(reinterpret_cast<const float4*>(a.partial_out + source * kLatent) + 32 * v +
                      lane);
      }
      add(x, lse);
    }
  }

  template <typename Element>
  __device__ __forceinline__ void store(const DecodeArguments& a, int64_t row) const {
    const int lane = threadIdx.x % 32;
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    auto* destination =
        reinterpret_cast<uint2*>(static_cast<Element*>(a.out) + row * kLatent) + lane;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      destination[32 * v] = make_uint2(pack<Element>(out[v].x * inverse, out[v].y * inverse),
                                       pack<Element>(out[v].z * inverse, out[v].w * inverse));
    }
    if (lane == 0) a.lse[row] = sum > 0.0f ? maximum + logf(sum) : kNegativeInfinity;
  }
};

// Persistent. Requests cut into few pieces go a row a warp; the others a row a thread block, whose
// warps share the row's pieces.
template <typename Element>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const __grid_constant__ DecodeArguments a) {
  __shared__ float4 shared_out[kCombineWarps][Merge::kVectors][32];
  __shared__ float shared_max[kCombineWarps], shared_sum[kCombineWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rows = a.h_kv * a.rows, all_rows = a.batch * rows;
  ptx::wait_for_previous_kernel();

  for (int i = blockIdx.x * kCombineWarps + warp; i < all_rows; i += gridDim.x * kCombineWarps) {
    const int request = i / rows, kv_head = i % rows / a.rows, row = i % a.rows;
    const int first = __ldg(a.split_offsets + request), last = __ldg(a.split_offsets + request + 1);
    if (first == last || last - first > kFewSplits) continue;
    Merge merge;
    merge.add_splits(a, kv_head, row, first, last, 1);
    merge.store<Element>(a, output_row(a, request, kv_head, row));
  }

  for (int i = blockIdx.x; i < all_rows; i += gridDim.x) {
    const int request = i / rows, kv_head = i % rows / a.rows, row = i % a.rows;
    const int first = __ldg(a.split_offsets + request), last = __ldg(a.split_offsets + request + 1);
    if (last - first <= kFewSplits) continue;
    Merge merge;
    merge.add_splits(a, kv_head, row, first + warp, last, kCombineWarps);
#pragma unroll
    for (int v = 0; v < Merge::kVectors; ++v) shared_out[warp][v][lane] = merge.out[v];
    if (lane == 0) shared_max[warp] = merge.maximum, shared_sum[warp] = merge.sum;
    __syncthreads();
    if (warp == 0) {
#pragma unroll
      for (int w = 1; w < kCombineWarps; ++w) {
        const float next = fmaxf(merge.maximum, shared_max[w]);
        if (next == kNegativeInfinity) continue;
        const float own_weight = __expf(merge.maximum - next),
                    weight = __expf(shared_max[w] - next);
        merge.maximum = next;
        merge.sum = merge.sum * own_weight + shared_sum[w] * weight;
#pragma unroll
        for (int v = 0; v < Merge::kVectors; ++v) {
          const float4 x = shared_out[w][v][lane];
          merge.out[v].x = merge.out[v].x * own_weight + x.x * weight;
          merge.out[v].y = merge.out[v].y * own_weight + x.y * weight;
          merge.out[v].z = merge.out[v].z * own_weight + x.z * weight;
          merge.out[v].w = merge.out[v].w * own_weight + x.w * weight;
        }
      }
      merge.store<Element>(a, output_row(a, request, kv_head, row));
    }
    __syncthreads();
  }
}

}  // namespace flashmla
