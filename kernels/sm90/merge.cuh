// Sums of weighted partial results of half a row, by one warp or by several.
#pragma once

#include <climits>

#include "sm90/decode_params.cuh"
#include "sm90/ptx/keep.cuh"
#include "sm90/ptx/math.cuh"
#include "sm90/quad.cuh"
#include "sm90/softmax.cuh"

namespace flashmla {

constexpr int kVectorColumns = 8;  // fp16 values in 16 bytes
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

__device__ __forceinline__ float exp_fast(float x) { return ptx::exp2_fast(x * kLog2E); }

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
      const float lse = __uint_as_float(state.x), next = ptx::max_or_nan(maximum, warp_max(lse));
      float weight = 0.0f;
      if (next != kNegativeInfinity) {
        if (base > 0) scale(exp_fast(maximum - next));
        maximum = next;
        weight = exp_fast(lse - next);
        sum += warp_sum(weight);
        weight *= scale_of(state.y, half);
      }
      // A piece that holds no token this row sees weighs nothing, whatever its result.
      const bool some_blind = __any_sync(~0u, lane < here && weight == 0.0f);
      for (int first = 0;;) {
        float own[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) own[i] = __shfl_sync(~0u, weight, first + i);
        if (some_blind) {
#pragma unroll
          for (int i = 0; i < kInFlight; ++i)
            if (own[i] == 0.0f) x[i] = uint4{};
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) add(x[i], own[i]);
        if (discards) discard_half_rows(values, base + first, min(kInFlight, here - first), stride);
        first += kInFlight;
        if (first >= here) break;
        load(x, values, stride, base + first, count);
      }
    }
  }

  __device__ __forceinline__ float inverse_sum() const { return inverse_of(sum); }

  __device__ __forceinline__ float log_sum() const {
    return sum != 0.0f ? fmaf(ptx::log2_fast(sum), kLn2, maximum) : kNegativeInfinity;
  }

 private:
  template <int kInFlight>
  __device__ __forceinline__ static void load(uint4 (&x)[kInFlight], const uint4* values,
                                              int stride, int first, int count) {
    const int vectors = stride * (kLatent / kVectorColumns);
    values += static_cast<int64_t>(first) * vectors;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i, values += vectors) {
      x[i] = first + i < count ? __ldcs(values) : uint4{};
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
      const float2 pair = unpack_halves(pairs[i]);
      out[2 * i] = fmaf(weight, pair.x, out[2 * i]);
      out[2 * i + 1] = fmaf(weight, pair.y, out[2 * i + 1]);
    }
  }
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
      own.maximum == kNegativeInfinity ? 0.0f : exp_fast(own.maximum - merge.maximum);
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

}  // namespace flashmla
