// Merges the partial results of requests that were cut:
// out = sum_i exp(lse_i - lse) out_i, lse = log sum_i exp(lse_i).
#pragma once

#include "sm90/decode_params.cuh"
#include "sm90/ptx/sync.cuh"
#include "sm90/softmax.cuh"

namespace flashmla {

constexpr int kCombineWarps = 8;
constexpr int kCombineThreads = 32 * kCombineWarps;
constexpr int kChunkColumns = 128;  // of a row, for one warp: 16 bytes a lane and partial result
constexpr int kChunks = kLatent / kChunkColumns;
constexpr int kFewSplits = 8;         // up to here on average one warp merges a chunk alone
constexpr int kSplitsInFlight = 8;    // loads that a lane has on their way

__device__ __forceinline__ float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Walks over the requests that were cut, 32 at a time; all lanes of a warp together.
struct CutRequests {
  const int32_t* split_offsets;
  int batch;
  int base = 0, before = 0;  // requests below `base` hold `before` cut ones

  __device__ __forceinline__ uint32_t mask(int group) const {
    const int request = group + threadIdx.x % 32;
    const bool cut = request < batch &&
                     __ldg(split_offsets + request) != __ldg(split_offsets + request + 1);
    return __ballot_sync(~0u, cut);
  }

  __device__ __forceinline__ int count() const {
    int cut = 0;
#pragma unroll 4
    for (int group = 0; group < batch; group += 32) cut += __popc(mask(group));
    return cut;
  }

  // The cut request of this rank, which must exist and not be less than the one before.
  __device__ __forceinline__ int find(int rank) {
    for (;; base += 32) {
      const uint32_t cut = mask(base);
      if (rank - before < __popc(cut)) return base + __fns(cut, 0, rank - before + 1);
      before += __popc(cut);
    }
  }
};

// Adds `count` partial results, each weighted by exp(lse - maximum); strides in elements.
__device__ __forceinline__ float4 weighted_sum(const float* out, const float* lse, int64_t stride,
                                               int count, float maximum) {
  const int lane = threadIdx.x % 32;
  const auto* next = reinterpret_cast<const float4*>(out) + lane;
  float4 sum{};
  for (int base = 0; base < count; base += 32) {
    const float weight =
        base + lane < count ? __expf(__ldg(lse + (base + lane) * stride) - maximum) : 0.0f;
    const int end = min(32, count - base);
    for (int j = 0; j < end; j += kSplitsInFlight) {
      float4 x[kSplitsInFlight];
#pragma unroll
      for (int i = 0; i < kSplitsInFlight; ++i) {
        if (j + i < end) x[i] = __ldcs(next);
        next += stride * (kLatent / 4);
      }
#pragma unroll
      for (int i = 0; i < kSplitsInFlight; ++i) {
        const float w = __shfl_sync(~0u, weight, j + i);
        // A piece that holds no token this row sees weighs nothing, whatever its result.
        if (w == 0.0f) continue;
        sum.x = fmaf(w, x[i].x, sum.x);
        sum.y = fmaf(w, x[i].y, sum.y);
        sum.z = fmaf(w, x[i].z, sum.z);
        sum.w = fmaf(w, x[i].w, sum.w);
      }
    }
  }
  return sum;
}

// A unit of work is a chunk of a row of a cut request: for one warp where pieces are few, else for
// a thread block, whose warps share the pieces.
template <typename Element>
__global__ void __launch_bounds__(kCombineThreads, 3)
    combine_kernel(const __grid_constant__ DecodeArguments a) {
  __shared__ float4 shared_sum[kCombineWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  const int splits = __ldg(a.split_offsets + a.batch);
  if (splits == 0) return;

  CutRequests requests{a.split_offsets, a.batch};
  const int cut = requests.count(), rows = a.h_kv * a.rows;
  const bool shared_by_warps = splits > kFewSplits * cut;
  const int step = shared_by_warps ? kCombineWarps : 1;
  const int workers = gridDim.x * (kCombineWarps / step);
  for (int unit = (blockIdx.x * kCombineWarps + warp) / step; unit < cut * rows * kChunks;
       unit += workers) {
    const int request = requests.find(unit / (rows * kChunks));
    const int kv_head = unit / kChunks % rows / a.rows, row = unit / kChunks % a.rows;
    const int chunk = unit % kChunks;
    const int first = __ldg(a.split_offsets + request),
              n = __ldg(a.split_offsets + request + 1) - first;
    const int64_t stride = static_cast<int64_t>(a.h_kv) * a.rows;
    const float* lse = a.partial_lse + partial_row(a, first, kv_head, row);

    float maximum = kNegativeInfinity, total = 0.0f;
    for (int i = lane; i < n; i += 32) maximum = fmaxf(maximum, __ldg(lse + i * stride));
    maximum = warp_max(maximum);
    if (maximum == kNegativeInfinity) maximum = 0.0f;  // no piece holds a token this row sees
    for (int i = lane; i < n; i += 32) total += __expf(__ldg(lse + i * stride) - maximum);
    total = warp_sum(total);

    const int own = shared_by_warps ? warp : 0;  // own, own + step, .. are this warp's pieces
    const float* out = a.partial_out + partial_row(a, first + own, kv_head, row) * kLatent;
    float4 sum = weighted_sum(out + chunk * kChunkColumns, lse + own * stride, stride * step,
                              (n - own + step - 1) / step, maximum);
    if (shared_by_warps) {
      shared_sum[warp][lane] = sum;
      __syncthreads();
      if (warp == 0) {
#pragma unroll
        for (int w = 1; w < kCombineWarps; ++w) {
          const float4 x = shared_sum[w][lane];
          sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
        }
      }
      __syncthreads();
      if (warp > 0) continue;
    }
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    const int64_t target = output_row(a, request, kv_head, row);
    reinterpret_cast<uint2*>(static_cast<Element*>(a.out) + target * kLatent +
                             chunk * kChunkColumns)[lane] =
        make_uint2(pack<Element>(sum.x * inverse, sum.y * inverse),
                   pack<Element>(sum.z * inverse, sum.w * inverse));
    if (lane == 0 && chunk == 0)
      a.lse[target] = total > 0.0f ? maximum + logf(total) : kNegativeInfinity;
  }
}

}  // namespace flashmla
