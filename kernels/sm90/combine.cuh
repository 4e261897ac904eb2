// Merges the partial results of requests that were cut:
// out = sum_i exp(lse_i - lse) out_i, lse = log sum_i exp(lse_i).
#pragma once

#include <climits>

#include "sm90/decode_params.cuh"
#include "sm90/ptx/keep.cuh"
#include "sm90/ptx/sync.cuh"
#include "sm90/quad.cuh"
#include "sm90/softmax.cuh"

namespace flashmla {

constexpr int kCombineWarpsLog2 = 4, kCombineWarps = 1 << kCombineWarpsLog2;
constexpr int kCombineThreads = 32 * kCombineWarps;
constexpr int kVectorColumns = 8;  // fp16 values in 16 bytes
constexpr int kRowHalves = 2;      // as O is kept; each one warp's vectors
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

// Partial results keep the order of an accumulator: of 32 columns, which four neighbours' vectors
// hold, each has every fourth pair. What this returns are eight neighbours.
__device__ __forceinline__ uint4 in_column_order(const uint4& vector) {
  uint32_t pairs[4] = {vector.x, vector.y, vector.z, vector.w};
  transpose_quad(pairs);
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// The larger one, NaN if either is.
__device__ __forceinline__ float max_or_nan(float x, float y) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(y));
  return larger;
}

// NaN if any x is: what arithmetic makes is positive, so above all numbers here.
__device__ __forceinline__ float warp_max(float x) {
  // Bits that are ordered as integers as the numbers are.
  const auto ordered = [](int bits) { return bits ^ (bits >> 31 & INT_MAX); };
  return __int_as_float(ordered(__reduce_max_sync(~0u, ordered(__float_as_int(x)))));
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// A running sum of weighted partial results of half a row; a lane holds one vector of it.
struct Merge {
  float maximum = kNegativeInfinity, sum = 0.0f;
  float out[kVectorColumns] = {};

  // Sums up `count` partial results that lie `stride` rows apart, from `values` and `states` on;
  // the latter are PartialStates. Each lane reads and weighs one of 32 pieces: instructions that
  // all lanes run for every piece are felt.
  template <int kInFlight>
  __device__ __forceinline__ void add_splits(const uint4* values, const uint2* states, int half,
                                             int stride, int count, bool discards) {
    const int lane = threadIdx.x % 32;
    for (int base = 0; base < count; base += 32) {
      const int here = min(32, count - base);
      uint2 state = make_uint2(__float_as_uint(kNegativeInfinity), 0);
      if (lane < here) state = __ldcs(states + static_cast<int64_t>(base + lane) * stride);
      uint4 x[kInFlight];
      load(x, values, stride, base, count);
      const float lse = __uint_as_float(state.x), next = max_or_nan(maximum, warp_max(lse));
      float weight = 0.0f;
      if (next != kNegativeInfinity) {
        if (base > 0) scale(__expf(maximum - next));
        maximum = next;
        weight = __expf(lse - next);
        sum += warp_sum(weight);
        weight *= scale_of(state.y, half);
      }
      for (int first = 0;;) {
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          const float own = __shfl_sync(~0u, weight, first + i);
          // A piece that holds no token this row sees weighs nothing, whatever its result.
          if (own != 0.0f) add(x[i], own);
        }
        if (discards) discard_half_rows(values, base + first, min(kInFlight, here - first), stride);
        first += kInFlight;
        if (first >= here) break;
        load(x, values, stride, base + first, count);
      }
    }
  }

  __device__ __forceinline__ float inverse_sum() const { return sum != 0.0f ? 1.0f / sum : 0.0f; }

  __device__ __forceinline__ float log_sum() const {
    return sum != 0.0f ? maximum + logf(sum) : kNegativeInfinity;
  }

 private:
  template <int kInFlight>
  __device__ __forceinline__ static void load(uint4 (&x)[kInFlight], const uint4* values,
                                              int stride, int first, int count) {
    const uint32_t vectors = stride * (kLatent / kVectorColumns);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i < count)
        x[i] = __ldcs(values + static_cast<uint64_t>(static_cast<uint32_t>(first + i)) * vectors);
    }
  }

  __device__ __forceinline__ void scale(float weight) {
    sum *= weight;
#pragma unroll
    for (float& x : out) x *= weight;
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
};

struct CutRequest {
  int number, first, count;
};

// The requests of a batch that were cut, found by a whole warp. It holds the offsets of 32
// requests, those of small batches all the time: each further load is a trip that the rest waits
// for.
class CutRequests {
 public:
  __device__ __forceinline__ explicit CutRequests(const DecodeArguments& a)
      : offsets_(a.split_offsets), batch_(a.batch) {
    load(0);
  }

  // Of the whole batch. Before any is asked for: the first 32 must be held.
  __device__ __forceinline__ int count() const {
    int cut = __popc(cut_);
#pragma unroll 4
    for (int group = 32; group < batch_; group += 32) {
      const int request = group + threadIdx.x % 32;
      cut += __popc(__ballot_sync(~0u, offset(request) != offset(request + 1)));
    }
    return cut;
  }

  // The cut request of this rank, which must exist. Ranks must not fall from call to call.
  __device__ __forceinline__ CutRequest operator()(int rank) {
    while (rank - before_ >= __popc(cut_)) {
      before_ += __popc(cut_);
      load(group_ + 32);
    }
    const uint32_t own = 1u << threadIdx.x % 32;
    const bool wanted = (cut_ & own) && __popc(cut_ & (own - 1)) == rank - before_;
    const int lane = __ffs(__ballot_sync(~0u, wanted)) - 1;
    const int first = __shfl_sync(~0u, first_, lane);
    return {group_ + lane, first, __shfl_sync(~0u, next_, lane) - first};
  }

 private:
  // That of requests that do not exist is the last one's end: they are not cut.
  __device__ __forceinline__ int offset(int request) const {
    return __ldg(offsets_ + min(request, batch_));
  }
  __device__ __forceinline__ void load(int group) {
    group_ = group;
    first_ = offset(group + threadIdx.x % 32);
    next_ = offset(group + threadIdx.x % 32 + 1);
    cut_ = __ballot_sync(~0u, first_ != next_);
  }

  const int32_t* offsets_;
  int batch_;
  int group_, before_ = 0;  // whose offsets are held, and the cut requests before it
  int first_, next_;        // this lane's request's
  uint32_t cut_;            // which of the group
};

// A warp's Merge, for others to read; in the order of columns.
struct alignas(16) SharedMerge {
  static constexpr int kPitch = 40;  // of 32 columns: 4 bytes a column, and lanes meet other banks
  float out[kLatent / kRowHalves / 32 * kPitch];
  float maximum, sum;

  __device__ __forceinline__ void put(const Merge& merge) {
    const int lane = threadIdx.x % 32;
    float* const own = out + lane / 4 * kPitch + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kVectorColumns; i += 2)
      *reinterpret_cast<float2*>(own + 4 * i) = make_float2(merge.out[i], merge.out[i + 1]);
    if (lane == 0) maximum = merge.maximum, sum = merge.sum;
  }

  // Columns 8 * number and up to the next.
  __device__ __forceinline__ const float4* vector(int number) const {
    return reinterpret_cast<const float4*>(out + number / 4 * kPitch + number % 4 * kVectorColumns);
  }
};

// Columns of half a row of which `count` warps have merged a share each: every `count` neighbours
// get vector `number`, in order, and each reads one warp's. All lanes of a warp together.
__device__ __forceinline__ Merge merge_shares(const SharedMerge* shares, int count, int number) {
  const SharedMerge& own = shares[threadIdx.x & (count - 1)];
  Merge merge;
  merge.maximum = own.maximum;
#pragma unroll 1
  for (int step = 1; step < count; step *= 2)
    merge.maximum = fmaxf(merge.maximum, __shfl_xor_sync(~0u, merge.maximum, step));
  // A warp without a piece, or whose pieces saw no token, counts for nothing.
  const float weight =
      own.maximum == kNegativeInfinity ? 0.0f : __expf(own.maximum - merge.maximum);
  merge.sum = weight * own.sum;
#pragma unroll
  for (int i = 0; i < kVectorColumns / 4; ++i) {
    const float4 x = own.vector(number)[i];
    merge.out[4 * i] = weight * x.x, merge.out[4 * i + 1] = weight * x.y;
    merge.out[4 * i + 2] = weight * x.z, merge.out[4 * i + 3] = weight * x.w;
  }
#pragma unroll 1
  for (int step = 1; step < count; step *= 2) {
    merge.sum += __shfl_xor_sync(~0u, merge.sum, step);
#pragma unroll
    for (float& x : merge.out) x += __shfl_xor_sync(~0u, x, step);
  }
  return merge;
}

// The greatest n >= 0 of which small * 2^n <= large; 0 if there is none.
__device__ __forceinline__ int log2_of_ratio(int large, int small) {
  const int n = max(0, __clz(small) - __clz(large));
  return n - (n > 0 && small << n > large);
}

template <typename Element, int kBlocksPerSm>
__global__ void __launch_bounds__(kCombineThreads, kBlocksPerSm)
    combine_kernel(const __grid_constant__ DecodeArguments a) {
  constexpr int kInFlight = 8 / kBlocksPerSm;  // vectors on their way: more warps, fewer registers
  __shared__ SharedMerge shared[kCombineWarps];
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  CutRequests requests(a);
  const int splits = __ldg(a.split_offsets + a.batch);
  if (splits == 0) return;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int cut = requests.count(), rows = a.all_rows.divisor, units = kRowHalves * cut * rows;
  const int warps = gridDim.x * kCombineWarps;
  // The pieces of half a row are shared among as many warps as there are, but no more than a cut
  // request has pieces on average; each takes every group-th one.
  const int group_log2 =
      min(kCombineWarpsLog2, min(log2_of_ratio(warps, units), log2_of_ratio(splits, cut)));
  const int group = 1 << group_log2;
  // Where few rows are many warps' work it would take longer than it saves.
  const bool discards = group <= 4;
  const int member = warp & (group - 1), per_round = gridDim.x * kCombineWarps >> group_log2;
  for (int base = 0; base < units; base += per_round) {
    // Neighbours go to different thread blocks: few rows, many SMs.
    const int unit = base + (warp >> group_log2) * gridDim.x + blockIdx.x;
    const bool real = unit < units;
    const int half = unit % kRowHalves, row = a.all_rows.remainder(unit / kRowHalves);
    CutRequest request{};
    Merge merge;
    if (real) {
      request = requests(a.all_rows.divide(unit / kRowHalves));
      const int64_t source = static_cast<int64_t>(request.first + member) * rows + row;
      merge.add_splits<kInFlight>(reinterpret_cast<const uint4*>(a.partial_out) +
                                      source * (kLatent / kVectorColumns) + 32 * half + lane,
                                  reinterpret_cast<const uint2*>(a.partial_lse) + source, half,
                                  group * rows, (request.count - member + group - 1) >> group_log2,
                                  discards);
    }
    int vector = lane;  // in the order of columns
    uint4 out;
    if (group == 1) {
      out = in_column_order(pack_vector<Element>(merge.out, merge.inverse_sum()));
    } else {
      shared[warp].put(merge);
      __syncthreads();
      vector = (member << (5 - group_log2)) + (lane >> group_log2);
      merge = merge_shares(shared + (warp - member), group, vector);
      out = pack_vector<Element>(merge.out, merge.inverse_sum());
      __syncthreads();  // the next round writes what may still be read
    }
    if (real && (lane & (group - 1)) == 0) {
      const int64_t target = output_row(a, request.number, row);
      reinterpret_cast<uint4*>(a.out)[target * (kLatent / kVectorColumns) + 32 * half + vector] =
          out;
      if (half == 0 && vector == 0) a.lse[target] = merge.log_sum();
    }
  }
}

}  // namespace flashmla
