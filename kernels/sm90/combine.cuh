// Merges the partial results of requests that were cut: out = sum_i exp(lse_i - lse) out_i, lse =
// log sum_i exp(lse_i).
#pragma once

#include "sm90/decode_params.cuh"
#include "sm90/ptx/sync.cuh"
#include "sm90/softmax.cuh"

namespace flashmla {

constexpr int kCombineWarps = 8;
constexpr int kCombineThreads = 32 * kCombineWarps;

// One thread block per output row at a time; its warps share the row's splits, each thread 16 of
// the 512 columns.
template <typename Element>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const __grid_constant__ DecodeArguments a) {
  constexpr int kVectors = 4;  // float4 of a thread: columns 128 v + 4 lane
  __shared__ float4 shared_out[kCombineWarps][kVectors][32];
  __shared__ float shared_max[kCombineWarps], shared_sum[kCombineWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rows = a.h_kv * a.rows;

  ptx::wait_for_previous_kernel();
  for (int i = blockIdx.x; i < a.batch * rows; i += gridDim.x) {
    const int request = i / rows, kv_head = i % rows / a.rows, row = i % a.rows;
    const int first = __ldg(a.split_offsets + request), last = __ldg(a.split_offsets + request + 1);
    if (first == last) continue;

    float maximum = kNegativeInfinity, sum = 0.0f;
    float4 out[kVectors] = {};
    for (int split = first + warp; split < last; split += kCombineWarps) {
      const int64_t source = partial_row(a, split, kv_head, row);
      const float lse = a.partial_lse[source];
      if (lse == kNegativeInfinity) continue;  // this piece holds no token that the row sees
      const float next = fmaxf(maximum, lse);
      const float old_weight = __expf(maximum - next), weight = __expf(lse - next);
      maximum = next;
      sum = sum * old_weight + weight;
      const auto* values = reinterpret_cast<const float4*>(a.partial_out + source * kLatent) + lane;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const float4 x = __ldcs(values + 32 * v);
        out[v].x = out[v].x * old_weight + x.x * weight;
        out[v].y = out[v].y * old_weight + x.y * weight;
        out[v].z = out[v].z * old_weight + x.z * weight;
        out[v].w = out[v].w * old_weight + x.w * weight;
      }
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) shared_out[warp][v][lane] = out[v];
    if (lane == 0) shared_max[warp] = maximum, shared_sum[warp] = sum;
    __syncthreads();

    float total_max = kNegativeInfinity, total = 0.0f;
#pragma unroll
    for (int w = 0; w < kCombineWarps; ++w) total_max = fmaxf(total_max, shared_max[w]);
    float weights[kCombineWarps];
#pragma unroll
    for (int w = 0; w < kCombineWarps; ++w) {
      weights[w] = shared_max[w] == kNegativeInfinity ? 0.0f : __expf(shared_max[w] - total_max);
      total += shared_sum[w] * weights[w];
    }
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    const int64_t destination = output_row(a, request, kv_head, row);
    if (threadIdx.x < kLatent / 4) {
      float4 result = {};
#pragma unroll
      for (int w = 0; w < kCombineWarps; ++w) {
        const float4 x = shared_out[w][threadIdx.x / 32][lane];
        result.x += x.x * weights[w];
        result.y += x.y * weights[w];
        result.z += x.z * weights[w];
        result.w += x.w * weights[w];
      }
      auto* out_row =
          reinterpret_cast<uint2*>(static_cast<Element*>(a.out) + destination * kLatent);
      out_row[threadIdx.x] = make_uint2(pack<Element>(result.x * inverse, result.y * inverse),
                                        pack<Element>(result.z * inverse, result.w * inverse));
    }
    if (threadIdx.x == 0)
      a.lse[destination] = total > 0.0f ? total_max + logf(total) : kNegativeInfinity;
    __syncthreads();
  }
}

}  // namespace flashmla
