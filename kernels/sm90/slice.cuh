// What the combine kernels share: a warp merges a slice of a row, the same of every piece.
#pragma once

#include <type_traits>

#include "sm90/decode_params.cuh"
#include "sm90/ptx/keep.cuh"
#include "sm90/ptx/order.cuh"
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

// Where columns lie in partial results: as threads hold them in accumulators. Half a row is 32
// blocks of eight columns; four blocks lie together, of which a vector has one pair each. They are
// neighbours or, from the kernel of few rows, two pairs of neighbours from two tiles; there the
// eight blocks that a warp has of all tiles lie side by side, so that it writes whole lines. Of
// block `block` in memory, the place in the row's half.
__device__ __forceinline__ uint32_t column_block(uint32_t block, bool few_rows) {
  return few_rows ? (block & 6) << 2 | (block >> 2 & 6) | (block & 1) : block;
}

// Where a lane's pairs of output columns go, in the order of columns.
template <int kWords>
class SliceOutput {
 public:
  __device__ __forceinline__ SliceOutput(void* out, int64_t row, int slice, bool few_rows) {
    const uint32_t lane = threadIdx.x % 32;
    if constexpr (kWords == 4) {
      to_ = static_cast<uint32_t*>(out) + (row * kRowHalves + slice) * (kLatent / kRowHalves / 2) +
            column_block(lane, few_rows) * 4;
    } else {
      const uint32_t word = (slice * 32 + lane) * kWords, block = word / 16 % 8 * 4 + word % 4;
      to_ = static_cast<uint32_t*>(out) + row * (kLatent / 2) + word / 128 * 128 +
            column_block(block, few_rows) * 4 + word / 4 % 4;
    }
  }

  __device__ __forceinline__ void use_pointers() const { ptx::use_pointer(to_); }

  // All lanes of a warp together.
  __device__ __forceinline__ void store(uint32_t (&pairs)[kWords]) const {
    if constexpr (kWords == 4) {
      transpose_quad(pairs);
      *reinterpret_cast<uint4*>(to_) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) to_[4 * i] = pairs[i];  // of the next block of columns
    }
  }

 private:
  uint32_t* to_;
};

}  // namespace flashmla
