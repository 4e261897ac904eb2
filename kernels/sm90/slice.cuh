// What the combine kernels share: a warp merges a slice of a row, the same of every piece.
#pragma once

#include <type_traits>

#include "sm90/decode_params.cuh"
#include "sm90/ptx/keep.cuh"
#include "sm90/quad.cuh"
#include "sm90/softmax.cuh"

namespace flashmla {

// A lane holds one vector of a slice: kWords pairs of fp16 values.
template <int kWords>  // 1, 2 or 4
using Vector =
    std::conditional_t<kWords == 1, uint32_t, std::conditional_t<kWords == 2, uint2, uint4>>;

// The slices of one kind of partial results: [pieces, rows, slices, 32 vectors].
template <int kWords>
struct Slices {
  static constexpr int kColumns = 32 * 2 * kWords, kCount = kLatent / kColumns;  // of a row
  static constexpr int kLinesLog2 = kWords / 2, kLines = 1 << kLinesLog2;  // of a slice; 128 bytes
  static_assert(kLines * 128 == 32 * sizeof(Vector<kWords>));

  const Vector<kWords>* own;  // this lane's vector of the first
  int64_t stride;             // from piece to piece, in vectors

  __device__ __forceinline__ Slices(const DecodeArguments& a, int64_t first_row, int rows,
                                    int slice)
      : own(reinterpret_cast<const Vector<kWords>*>(a.partial_out) +
            (first_row * kCount + slice) * 32 + threadIdx.x % 32),
        stride(static_cast<int64_t>(rows) * kCount * 32) {}

  // Those of pieces `first`, first + 1 .. as far as they are below `count`.
  template <int kInFlight>
  __device__ __forceinline__ void load(Vector<kWords> (&x)[kInFlight], int first, int count) const {
    const Vector<kWords>* from = own + first * stride;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i, from += stride)
      x[i] = first + i < count ? __ldcs(from) : Vector<kWords>{};
  }

  // Those of `count` pieces, which the warp has read for the last time.
  __device__ __forceinline__ void discard(int first, int count) const {
    constexpr int kLanes = 32 >> kLinesLog2;  // that share a line
    const int lane = threadIdx.x % kLanes;
    __syncwarp();  // all lanes have read theirs
    for (int i = lane; i < count; i += kLanes) ptx::discard_line(own - lane + (first + i) * stride);
  }

  // Which half of the row a slice is of.
  __device__ __forceinline__ static int half_of(int slice) { return slice / (kCount / kRowHalves); }
};

template <int kWords>
__device__ __forceinline__ void get_words(const Vector<kWords>& vector, uint32_t (&words)[kWords]) {
  if constexpr (kWords == 1) {
    words[0] = vector;
  } else {
    words[0] = vector.x, words[1] = vector.y;
    if constexpr (kWords == 4) words[2] = vector.z, words[3] = vector.w;
  }
}

template <int kWords>
__device__ __forceinline__ void put_words(const uint32_t (&words)[kWords], Vector<kWords>& vector) {
  if constexpr (kWords == 1) {
    vector = words[0];
  } else {
    vector.x = words[0], vector.y = words[1];
    if constexpr (kWords == 4) vector.z = words[2], vector.w = words[3];
  }
}

// A lane's pairs of output columns to a row of the output, in the order of columns. Partial results
// keep that of an accumulator: of 32 columns, which sixteen words hold, each four neighbours have
// every fourth pair. All lanes of a warp together.
template <int kWords>
__device__ __forceinline__ void store_slice(void* out, int64_t row, int slice,
                                            uint32_t (&pairs)[kWords]) {
  const int lane = threadIdx.x % 32;
  auto* const to =
      static_cast<uint32_t*>(out) + (row * Slices<kWords>::kCount + slice) * 32 * kWords;
  if constexpr (kWords == 4) {
    transpose_quad(pairs);
    reinterpret_cast<uint4*>(to)[lane] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int word = kWords * lane + i;
      to[word / 16 * 16 + word % 4 * 4 + word / 4 % 4] = pairs[i];
    }
  }
}

}  // namespace flashmla
