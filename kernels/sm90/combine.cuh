// Merges the partial results of requests that were cut:
// out = sum_i exp(lse_i - lse) out_i, lse = log sum_i exp(lse_i).
#pragma once

#include "sm90/decode_params.cuh"
#include "sm90/ptx/sync.cuh"
#include "sm90/softmax.cuh"

namespace flashmla {

constexpr int kCombineWarps = 8;
constexpr int kCombineThreads = 32 * kCombineWarps;
constexpr int kCombineBlocksPerSm = 3;
constexpr int kFewSplits = 8;        // up to here, on average, a row is for one warp
constexpr int kRowVectors = 4;       // 16-byte vectors that a lane holds of a whole row ..
constexpr int kVectorsInFlight = 8;  // .. and how many of them it has on their way

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

template <typename Element>
__global__ void __launch_bounds__(kCombineThreads, kCombineBlocksPerSm)
    combine_kernel(const __grid_constant__ DecodeArguments a) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  const int splits = __ldg(a.split_offsets + a.batch);
  if (splits == 0) return;

  const CutRequests requests{a.split_offsets, a.batch};
  const int cut = requests.count(), rows = a.h_kv * a.rows;
  const int64_t stride = rows;
  const auto* partial_out = reinterpret_cast<const float4*>(a.partial_out) + lane;
  const auto find = [&](int rank) { return cut == a.batch ? rank : requests.find(rank); };

  if (splits <= kFewSplits * cut) {
    // A warp merges a row. Neighbouring rows go to different thread blocks: few rows, many SMs.
    for (int i = warp * gridDim.x + blockIdx.x; i < cut * rows; i += gridDim.x * kCombineWarps) {
      const int request = find(i / rows), row = i % rows;
      const int first = __ldg(a.split_offsets + request);
      const int64_t source = first * stride + row;
      Merge<kRowVectors> merge;
      merge.add_splits(partial_out + source * (kLatent / 4), a.partial_lse + source, stride,
                       __ldg(a.split_offsets + request + 1) - first);
      const int64_t target = output_row(a, request, row / a.rows, row % a.rows);
      merge.template store<Element>(static_cast<Element*>(a.out) + target * kLatent,
                                    a.lse + target);
    }
    return;
  }

  // A thread block merges 128 columns of a row, each warp every eighth piece.
  __shared__ float4 shared_out[kCombineWarps][32];
  __shared__ float shared_max[kCombineWarps], shared_sum[kCombineWarps];
  for (int i = blockIdx.x; i < cut * rows * kRowVectors; i += gridDim.x) {
    const int request = find(i / kRowVectors / rows), row = i / kRowVectors % rows;
    const int chunk = i % kRowVectors;
    const int first = __ldg(a.split_offsets + request),
              count = __ldg(a.split_offsets + request + 1) - first;
    const int64_t source = (first + warp) * stride + row;
    Merge<1> merge;
    merge.add_splits(partial_out + source * (kLatent / 4) + 32 * chunk, a.partial_lse + source,
                     kCombineWarps * stride, (count - warp + kCombineWarps - 1) / kCombineWarps);
    shared_out[warp][lane] = merge.out[0];
    if (lane == 0) shared_max[warp] = merge.maximum, shared_sum[warp] = merge.sum;
    __syncthreads();
    if (warp == 0) {
      for (int w = 1; w < kCombineWarps; ++w) {
        if (shared_max[w] == kNegativeInfinity) continue;
        const float4 x[1] = {shared_out[w][lane]};
        merge.scale(fmaxf(merge.maximum, shared_max[w]));
        merge.add(x, shared_max[w], shared_sum[w]);
      }
      const int64_t target = output_row(a, request, row / a.rows, row % a.rows);
      merge.template store<Element>(static_cast<Element*>(a.out) + target * kLatent + 128 * chunk,
                                    a.lse + target);
    }
    __syncthreads();
  }
}

}  // namespace flashmla
