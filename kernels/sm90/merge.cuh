// Sums of weighted partial results of a slice of a row, by one warp or by several.
#pragma once

#include <climits>

#include "sm90/pieces.cuh"
#include "sm90/ptx/math.cuh"

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

// Of numbers 0 .. 1; NaN counts for nothing. As integers, for which a warp has an instruction.
__device__ __forceinline__ float warp_sum_of_weights(float weight) {
  constexpr float kUnit = 1 << 26;  // 32 of which times 1 are within 32 bits
  return __reduce_add_sync(~0u, __float2uint_rn(weight * kUnit)) * (1.0f / kUnit);
}

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

  // Sums up partial results, of which the first states and vectors have been asked for; `half`:
  // which of a row the slice is of. Each lane reads and weighs one of 32: instructions that all
  // lanes run for every piece are felt.
  template <bool kDiscards, int kInFlight>
  __device__ __forceinline__ void add_pieces(const Pieces<kWords, kInFlight>& pieces, uint2 state,
                                             Vector<kWords> (&x)[kInFlight], int half) {
    const int lane = threadIdx.x % 32;
    float weight = 0.0f, summand = 0.0f;
    bool some_blind = false;
    for (int first = 0;;) {
      if (first % 32 == 0) {
        const float lse = __uint_as_float(state.x), next = ptx::max_or_nan(maximum, warp_max(lse));
        const bool blind = next == kNegativeInfinity;
        if (first > 0 && !blind) scale(exp_fast(maximum - next));
        maximum = next;
        summand = blind ? 0.0f : exp_fast(lse - next);
        weight = summand * scale_of(state.y, half);
        // A piece that holds no token this row sees weighs nothing, whatever its result.
        some_blind = __any_sync(~0u, first + lane < pieces.count && weight == 0.0f);
      }
      float own[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) own[i] = __shfl_sync(~0u, weight, i);
      sum += warp_sum_of_weights(summand);
      summand = 0.0f;
      if (some_blind) {
#pragma unroll
        for (int i = 0; i < kInFlight; ++i)
          if (own[i] == 0.0f) x[i] = Vector<kWords>{};
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) add(x[i], own[i]);
      if (kDiscards) pieces.discard(first);
      first += kInFlight;
      if (first >= pieces.count) break;
      weight = __shfl_sync(~0u, weight, lane + kInFlight);
      pieces.load(x, first);
      if (first % 32 == 0) state = pieces.load_state(first);
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
    if (maximum == kNegativeInfinity) return kNegativeInfinity;
    return fmaf(ptx::log2_fast(sum), kLn2, maximum);
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
