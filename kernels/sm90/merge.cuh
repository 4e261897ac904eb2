// Sums of weighted partial results of a slice of a row, by one warp or by several.
#pragma once

#include <climits>

#include "sm90/ptx/math.cuh"
#include "sm90/slice.cuh"

namespace flashmla {

// Of both halves' scales, as PartialState keeps them, that of one.
__device__ __forceinline__ float scale_of(uint32_t scales, int half) {
  return __uint_as_float(half == 0 ? scales << 16 : scales & 0xffff0000);
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

// A warp's Merge, for another warp to read.
template <int kWords>
struct SharedMerge {
  float2 out[kWords][32];
  float maximum, sum;
};

// A running sum of weighted partial results of a slice; a lane holds one vector of it.
template <int kWords>
struct Merge {
  float maximum = kNegativeInfinity, sum = 0.0f;
  float2 out[kWords] = {};

  // Sums up `count` partial results, the states of which lie `stride` apart from `states` on. Each
  // lane reads and weighs one of 32: instructions that all lanes run for every piece are felt.
  template <int kInFlight, bool kDiscards>
  __device__ __forceinline__ void add_pieces(const Slices<kWords>& slices,
                                             const PartialState* states, int half, int stride,
                                             int count) {
    const int lane = threadIdx.x % 32;
    for (int base = 0; base < count; base += 32) {
      const int here = min(32, count - base);
      uint2 state = make_uint2(__float_as_uint(kNegativeInfinity), 0);
      if (lane < here)
        state = __ldcs(reinterpret_cast<const uint2*>(states + int64_t{base + lane} * stride));
      Vector<kWords> x[kInFlight];
      slices.load(x, base, count);
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
            if (own[i] == 0.0f) x[i] = Vector<kWords>{};
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) add(x[i], own[i]);
        if (kDiscards) slices.discard(base + first, min(kInFlight, here - first));
        first += kInFlight;
        if (first >= here) break;
        slices.load(x, base + first, count);
      }
    }
  }

  __device__ __forceinline__ void put(SharedMerge<kWords>& shared) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kWords; ++i) shared.out[i][lane] = out[i];
    if (lane == 0) shared.maximum = maximum, shared.sum = sum;
  }

  // Of what `count` warps have put there. Each lane weighs one of them.
  __device__ __forceinline__ static Merge of_shares(const SharedMerge<kWords>* shares, int count) {
    const int lane = threadIdx.x % 32;
    const float own = lane < count ? shares[lane].maximum : kNegativeInfinity;
    Merge merge;
    merge.maximum = warp_max(own);
    // A warp without a piece, or whose pieces saw no token, counts for nothing.
    const float weight = own == kNegativeInfinity ? 0.0f : exp_fast(own - merge.maximum);
    merge.sum = warp_sum(lane < count ? weight * shares[lane].sum : 0.0f);
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const float from = __shfl_sync(~0u, weight, i);
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        const float2 x = shares[i].out[j][lane];
        merge.out[j].x = fmaf(from, x.x, merge.out[j].x);
        merge.out[j].y = fmaf(from, x.y, merge.out[j].y);
      }
    }
    return merge;
  }

  // The output's values.
  template <typename Element>
  __device__ __forceinline__ void get_pairs(uint32_t (&pairs)[kWords]) const {
    const float inverse = inverse_of(sum);
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      pairs[i] = pack<Element>(out[i].x * inverse, out[i].y * inverse);
  }

  __device__ __forceinline__ float log_sum() const {
    return sum != 0.0f ? fmaf(ptx::log2_fast(sum), kLn2, maximum) : kNegativeInfinity;
  }

 private:
  __device__ __forceinline__ void scale(float weight) {
    sum *= weight;
#pragma unroll
    for (float2& x : out) x.x *= weight, x.y *= weight;
  }

  __device__ __forceinline__ void add(const Vector<kWords>& x, float weight) {
    uint32_t pairs[kWords];
    get_words<kWords>(x, pairs);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const float2 pair = unpack_halves(pairs[i]);
      out[i].x = fmaf(weight, pair.x, out[i].x), out[i].y = fmaf(weight, pair.y, out[i].y);
    }
  }
};

}  // namespace flashmla
