// Merges the partial results of requests that were cut:
// out = sum_i exp(lse_i - lse) out_i, lse = log sum_i exp(lse_i).
#pragma once

#include "sm90/decode_params.cuh"
#include "sm90/ptx/keep.cuh"
#include "sm90/ptx/sync.cuh"
#include "sm90/softmax.cuh"

namespace flashmla {

constexpr int kCombineWarps = 16;
constexpr int kCombineThreads = 32 * kCombineWarps;
constexpr int kCombineBlocksPerSm = 1;
constexpr int kVectorColumns = 8;   // fp16 values in 16 bytes
constexpr int kSplitsInFlight = 8;  // whose vectors a lane has on their way
constexpr int kRowHalves = 2;       // as O is kept; each one warp's vectors
static_assert(kRowHalves * 32 * kVectorColumns == kLatent);

// Of both halves' scales, as PartialState keeps them, that of one.
__device__ __forceinline__ float scale_of(uint32_t scales, int half) {
  return __uint_as_float(half == 0 ? scales << 16 : scales & 0xffff0000);
}

// Half rows `first` .. `first + count - 1`, `stride` rows apart, which a warp has read for the last
// time; `own` is a lane's vector of the one numbered 0. Eight lanes share a line.
__device__ __forceinline__ void discard_half_rows(const uint4* own, int first, int count,
                                                  int64_t stride) {
  __syncwarp();  // all lanes have read theirs
  for (int i = threadIdx.x % 8; i < count; i += 8)
    ptx::discard_line(own - threadIdx.x % 8 + (first + i) * stride * (kLatent / kVectorColumns));
}

template <typename Element>
__device__ __forceinline__ uint4 pack_vector(const float (&x)[kVectorColumns], float scale) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = pack<Element>(x[2 * i] * scale, x[2 * i + 1] * scale);
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// A running sum of weighted partial results of half a row; a lane holds one vector of it.
struct Merge {
  float maximum = kNegativeInfinity, sum = 0.0f;
  float out[kVectorColumns] = {};

  __device__ __forceinline__ void scale(float next) {
    const float weight = __expf(maximum - next);
    maximum = next;
    sum *= weight;
#pragma unroll
    for (float& x : out) x *= weight;
  }

  // Counts in a sum of weights `x_sum` relative to `x_maximum` <= maximum; returns its weight.
  __device__ __forceinline__ float weigh(float x_maximum, float x_sum) {
    const float weight = __expf(x_maximum - maximum);
    sum = fmaf(weight, x_sum, sum);
    return weight;
  }

  __device__ __forceinline__ void add(const uint4& x, float weight) {
    const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(pairs[i]));
      out[2 * i] = fmaf(weight, pair.x, out[2 * i]);
      out[2 * i + 1] = fmaf(weight, pair.y, out[2 * i + 1]);
    }
  }

  // `count` partial results that lie `stride` rows apart, from `partial_out` and `states` on; the
  // latter are PartialStates.
  __device__ __forceinline__ void add_splits(const uint4* partial_out, const uint2* states,
                                             int half, int64_t stride, int count, bool discards) {
    const int64_t next_split = stride * (kLatent / kVectorColumns);
    for (int base = 0; base < count; base += kSplitsInFlight) {
      float lse[kSplitsInFlight];
      uint32_t scales[kSplitsInFlight];
      uint4 x[kSplitsInFlight];
      const uint4* const first = partial_out;
#pragma unroll
      for (int i = 0; i < kSplitsInFlight; ++i) {
        lse[i] = kNegativeInfinity;
        if (base + i < count) {
          const uint2 state = __ldcs(states);
          lse[i] = __uint_as_float(state.x), scales[i] = state.y;
          x[i] = __ldcs(partial_out);
        }
        states += stride;
        partial_out += next_split;
      }
      float next = maximum;
#pragma unroll
      for (int i = 0; i < kSplitsInFlight; ++i) next = fmaxf(next, lse[i]);
      if (next != kNegativeInfinity) {
        scale(next);
#pragma unroll
        for (int i = 0; i < kSplitsInFlight; ++i) {
          const float weight = weigh(lse[i], 1.0f);
          // A piece that holds no token this row sees weighs nothing, whatever its result.
          if (weight == 0.0f) continue;
          add(x[i], weight * scale_of(scales[i], half));
        }
      }
      if (discards) discard_half_rows(first, 0, min(kSplitsInFlight, count - base), stride);
    }
  }

  // Every lane its own vector of the row's half.
  template <typename Element>
  __device__ __forceinline__ void store(uint4* out_vector) const {
    *out_vector = pack_vector<Element>(out, sum > 0.0f ? 1.0f / sum : 0.0f);
  }

  __device__ __forceinline__ float log_sum() const {
    return sum > 0.0f ? maximum + logf(sum) : kNegativeInfinity;
  }
};

struct CutRequest {
  int number, first, count;
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

  // The rank-th of `cut` cut requests, and its slots among the partial results.
  __device__ __forceinline__ CutRequest operator()(int rank, int cut) const {
    const int number = cut < batch ? find(rank) : rank;
    const int first = __ldg(split_offsets + number);
    return {number, first, __ldg(split_offsets + number + 1) - first};
  }
};

// One warp's Merge on its way to another.
struct SharedMerge {
  float out[kVectorColumns][32];
  float maximum, sum;

  __device__ __forceinline__ void put(const Merge& merge) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kVectorColumns; ++i) out[i][lane] = merge.out[i];
    if (lane == 0) maximum = merge.maximum, sum = merge.sum;
  }

  __device__ __forceinline__ void add_to(Merge* merge) const {
    if (maximum == kNegativeInfinity) return;
    merge->scale(fmaxf(merge->maximum, maximum));
    const float weight = merge->weigh(maximum, sum);
    if (weight == 0.0f) return;
#pragma unroll
    for (int i = 0; i < kVectorColumns; ++i)
      merge->out[i] = fmaf(weight, out[i][threadIdx.x % 32], merge->out[i]);
  }
};

template <typename Element>
__global__ void __launch_bounds__(kCombineThreads, kCombineBlocksPerSm)
    combine_kernel(const __grid_constant__ DecodeArguments a) {
  __shared__ SharedMerge shared[kCombineWarps];
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  const int splits = __ldg(a.split_offsets + a.batch);
  if (splits == 0) return;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const CutRequests requests{a.split_offsets, a.batch};
  const int cut = requests.count(), rows = a.h_kv * a.rows, units = kRowHalves * cut * rows;
  const int warps = gridDim.x * kCombineWarps;
  // The pieces of half a row are shared among as many warps as there are, but no more than it has
  // pieces; each takes every group-th one.
  int group = 1;
  while (2 * group <= kCombineWarps && units * 2 * group <= warps && 2 * group * cut <= splits)
    group *= 2;
  // Where few rows are many warps' work it would take longer than it saves.
  const bool discards = group <= 4;
  const int member = warp % group, per_round = gridDim.x * (kCombineWarps / group);
  for (int base = 0; base < units; base += per_round) {
    // Neighbours go to different thread blocks: few rows, many SMs.
    const int unit = base + warp / group * gridDim.x + blockIdx.x;
    const bool real = unit < units;
    const int half = unit % kRowHalves, row = unit / kRowHalves % rows;
    CutRequest request{};
    Merge merge;
    if (real) {
      request = requests(unit / kRowHalves / rows, cut);
      const int64_t source = static_cast<int64_t>(request.first + member) * rows + row;
      merge.add_splits(reinterpret_cast<const uint4*>(a.partial_out) +
                           source * (kLatent / kVectorColumns) + 32 * half + lane,
                       reinterpret_cast<const uint2*>(a.partial_lse) + source, half,
                       static_cast<int64_t>(group) * rows,
                       (request.count - member + group - 1) / group, discards);
    }
    for (int step = group / 2; step > 0; step /= 2) {  // the upper half of members to the lower
      if (member >= step && member < 2 * step) shared[warp].put(merge);
      __syncthreads();
      if (member < step) shared[warp + step].add_to(&merge);
    }
    if (group > 1) __syncthreads();  // the next round writes what may still be read
    if (real && member == 0) {
      const int64_t target = output_row(a, request.number, row / a.rows, row % a.rows);
      merge.store<Element>(reinterpret_cast<uint4*>(static_cast<Element*>(a.out)) +
                           target * (kLatent / kVectorColumns) + 32 * half + lane);
      if (half == 0 && lane == 0) a.lse[target] = merge.log_sum();
    }
  }
}

}  // namespace flashmla
