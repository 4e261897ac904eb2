// Merges the partial results of requests that were cut:
// out = sum_i exp(lse_i - lse) out_i, lse = log sum_i exp(lse_i).
#pragma once

#include "sm90/decode_params.cuh"
#include "sm90/ptx/sync.cuh"
#include "sm90/softmax.cuh"

namespace flashmla {

constexpr int kCombineWarps = 8;
constexpr int kCombineThreads = 32 * kCombineWarps;
constexpr int kCombineBlocksPerSm = 2;
constexpr int kRowVectors = kLatent / 128;  // 16-byte vectors that a lane holds of a whole row
constexpr int kVectorsInFlight = 16;        // that a lane has on their way

// A running sum of weighted partial results; a lane holds vectors `lane + 32 v` of its columns.
template <int kVectors>
struct Merge {
  float maximum = kNegativeInfinity, sum = 0.0f;
  float4 out[kVectors] = {};

  __device__ __forceinline__ void scale(float next) {
    const float weight = __expf(maximum - next);
    maximum = next;
    sum *= weight;
#pragma unroll
    for (float4& x : out) x = make_float4(x.x * weight, x.y * weight, x.z * weight, x.w * weight);
  }

  // Adds `x`, which is itself a sum of weights `x_sum` relative to `x_maximum` <= maximum.
  __device__ __forceinline__ void add(const float4 (&x)[kVectors], float x_maximum, float x_sum) {
    const float weight = __expf(x_maximum - maximum);
    // A piece that holds no token this row sees weighs nothing, whatever its result.
    if (weight == 0.0f) return;
    sum = fmaf(weight, x_sum, sum);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      out[v].x = fmaf(weight, x[v].x, out[v].x);
      out[v].y = fmaf(weight, x[v].y, out[v].y);
      out[v].z = fmaf(weight, x[v].z, out[v].z);
      out[v].w = fmaf(weight, x[v].w, out[v].w);
    }
  }

  // `count` partial results that lie `stride` rows apart, from `partial_out` and `partial_lse` on.
  __device__ __forceinline__ void add_splits(const float4* partial_out, const float* partial_lse,
                                             int64_t stride, int count) {
    constexpr int kBatch = kVectorsInFlight / kVectors;
    for (int base = 0; base < count; base += kBatch) {
      float lse[kBatch];
      float4 x[kBatch][kVectors];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        lse[i] = kNegativeInfinity;
        if (base + i < count) {
          lse[i] = __ldcs(partial_lse);
#pragma unroll
          for (int v = 0; v < kVectors; ++v) x[i][v] = __ldcs(partial_out + 32 * v);
        }
        partial_lse += stride;
        partial_out += stride * (kLatent / 4);
      }
      float next = maximum;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) next = fmaxf(next, lse[i]);
      if (next == kNegativeInfinity) continue;
      scale(next);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) add(x[i], lse[i], 1.0f);
    }
  }

  template <typename Element>
  __device__ __forceinline__ void store(void* out_row, float* lse) const {
    const int lane = threadIdx.x % 32;
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      static_cast<uint2*>(out_row)[lane + 32 * v] =
          make_uint2(pack<Element>(out[v].x * inverse, out[v].y * inverse),
                     pack<Element>(out[v].z * inverse, out[v].w * inverse));
    }
    if (lane == 0) *lse = sum > 0.0f ? maximum + logf(sum) : kNegativeInfinity;
  }
};

// The requests of a batch that were cut, found 32 at a time by a whole warp.
struct CutRequests {
  const int32_t* split_offsets;
  int batch;

  __device__ __forceinline__ uint32_t mask(int group) const {
    const int request = group + threadIdx.x % 32;
    return __ballot_sync(~0u, request < batch && __ldg(split_offsets + request) !=
                                                     __ldg(split_offsets + request + 1));
  }

  __device__ __forceinline__ int count() const {
    int cut = 0;
#pragma unroll 4
    for (int group = 0; group < batch; group += 32) cut += __popc(mask(group));
    return cut;
  }

  // The cut request of this rank, which must exist.
  __device__ __forceinline__ int find(int rank) const {
    for (int group = 0;; group += 32) {
      const uint32_t cut = mask(group);
      if (rank < __popc(cut)) {
        const uint32_t own = 1u << threadIdx.x % 32;
        const bool wanted = (cut & own) && __popc(cut & (own - 1)) == rank;
        return group + __ffs(__ballot_sync(~0u, wanted)) - 1;
      }
      rank -= __popc(cut);
    }
  }
};

struct CombineShared {
  float4 out[kCombineWarps][kRowVectors][32];
  float maximum[kCombineWarps], sum[kCombineWarps];
};

// `group` warps of a thread block share the pieces of a row's 128 kVectors columns, each taking
// every group-th one.
template <typename Element, int kVectors>
__device__ __forceinline__ void merge_rows(const DecodeArguments& a, CombineShared& shared,
                                           const CutRequests& requests, int cut, int group) {
  constexpr int kChunks = kRowVectors / kVectors;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, member = warp % group;
  const int rows = a.h_kv * a.rows, units = cut * rows * kChunks;
  const int64_t stride = rows;
  const int per_round = gridDim.x * (kCombineWarps / group);
  for (int base = 0; base < units; base += per_round) {
    // Neighbours go to different thread blocks: few rows, many SMs.
    const int unit = base + warp / group * gridDim.x + blockIdx.x;
    const bool real = unit < units;
    const int chunk = unit % kChunks, row = unit / kChunks % rows;
    int request = 0;
    Merge<kVectors> merge;
    if (real) {
      request = unit / kChunks / rows;
      if (cut < a.batch) request = requests.find(request);
      const int first = __ldg(a.split_offsets + request),
                count = __ldg(a.split_offsets + request + 1) - first;
      const int64_t source = (first + member) * stride + row;
      merge.add_splits(reinterpret_cast<const float4*>(a.partial_out + source * kLatent) +
                           32 * kVectors * chunk + lane,
                       a.partial_lse + source, group * stride,
                       (count - member + group - 1) / group);
    }
    if (group > 1) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) shared.out[warp][v][lane] = merge.out[v];
      if (lane == 0) shared.maximum[warp] = merge.maximum, shared.sum[warp] = merge.sum;
      __syncthreads();
      for (int other = warp + 1; member == 0 && other < warp + group; ++other) {
        const float maximum = shared.maximum[other];
        if (maximum == kNegativeInfinity) continue;
        float4 x[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) x[v] = shared.out[other][v][lane];
        merge.scale(fmaxf(merge.maximum, maximum));
        merge.add(x, maximum, shared.sum[other]);
      }
      __syncthreads();
    }
    if (real && member == 0) {
      const int64_t target = output_row(a, request, row / a.rows, row % a.rows);
      merge.template store<Element>(
          static_cast<Element*>(a.out) + target * kLatent + 128 * kVectors * chunk, a.lse + target);
    }
  }
}

template <typename Element>
__global__ void __launch_bounds__(kCombineThreads, kCombineBlocksPerSm)
    combine_kernel(const __grid_constant__ DecodeArguments a) {
  __shared__ CombineShared shared;
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  const int splits = __ldg(a.split_offsets + a.batch);
  if (splits == 0) return;

  const CutRequests requests{a.split_offsets, a.batch};
  const int cut = requests.count(), rows = cut * a.h_kv * a.rows;
  const int warps = gridDim.x * kCombineWarps;
  // As many warps to a row as there are, but no more than it has pieces.
  if (rows * kRowVectors * kCombineWarps <= warps) {
    merge_rows<Element, 1>(a, shared, requests, cut, kCombineWarps);
  } else {
    int group = 1;
    while (2 * group <= kCombineWarps && rows * 2 * group <= warps && 2 * group * cut <= splits)
      group *= 2;
    merge_rows<Element, kRowVectors>(a, shared, requests, cut, group);
  }
}

}  // namespace flashmla
