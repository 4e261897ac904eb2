// From the accumulators of the decode kernel of few rows to memory.
#pragma once

#include "sm90/few_rows/shared.cuh"
#include "sm90/output.cuh"
#include "sm90/ptx/matrix.cuh"

namespace flashmla::few_rows {

// O^T of one warpgroup: 64 latent columns a tile.
using Output = float[kHalfTiles][kAccumulator];

__device__ __forceinline__ void pin_output(Output& o) {
#pragma unroll
  for (int tile = 0; tile < kHalfTiles; ++tile) ptx::pin_registers(o[tile]);
}

__device__ __forceinline__ void rescale_output(Output& o, const float (&factor)[kOwnRows]) {
#pragma unroll
  for (int tile = 0; tile < kHalfTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < kAccumulator; ++i) o[tile][i] *= factor[row_index(i)];
  }
}

// A warp's blocks of O^T on their way through shared memory, where they become blocks of O. Four of
// 8 x 8 at a time, of rows 8 n .. 8 n + 7: block j is of tile 2 i + j / 2, of whose columns it has
// 16 warp + 8 (j % 2) + (0 .. 7).
template <typename Element>
class Turn {
 public:
  static constexpr int kRoomBytes = 4 * 8 * 16;

  // `rooms`: of this warp, one for each i.
  __device__ __forceinline__ explicit Turn(uint8_t* rooms)
      : rooms_(rooms), named_row_(offset(threadIdx.x % 32 / 8, threadIdx.x % 8)) {}

  __device__ __forceinline__ void put(const Output& o, int n, int i,
                                      const float (&factor)[kOwnRows]) const {
    uint32_t v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* const x = o[2 * i + j / 2] + 4 * n + j % 2 * 2;
      v[j] = pack<Element>(x[0] * factor[2 * n], x[1] * factor[2 * n + 1]);
    }
    ptx::store_transposed(ptx::smem_address(rooms_ + i * kRoomBytes + named_row_), v);
    __syncwarp();
  }
  // All eight columns of row 8 n + lane / 4, of block lane % 4.
  __device__ __forceinline__ uint4 get_columns(int i) const {
    const int lane = threadIdx.x % 32;
    return *reinterpret_cast<const uint4*>(rooms_ + i * kRoomBytes + offset(lane % 4, lane / 4));
  }
  // Of that row the pair of columns 2 (lane % 4) + {0, 1}, of all blocks.
  __device__ __forceinline__ void get_pairs(int i, uint32_t (&pairs)[4]) const {
    ptx::load_matrices(ptx::smem_address(rooms_ + i * kRoomBytes + named_row_), pairs);
  }

 private:
  // Block j's rows are shifted, so that one row of each block is read without conflicts.
  __device__ __forceinline__ static int offset(int j, int row) {
    return 16 * (8 * j + (row ^ 2 * j));
  }

  uint8_t* rooms_;
  int named_row_;  // for instructions that move matrices
};

// To the output. Two threads of a quad have 32 bytes side by side.
template <typename Element, bool kRagged>
__device__ __forceinline__ void store_whole(const DecodeArguments& a, const Item& item, int kv_head,
                                            int half, const Output& o, float inverse_of_row,
                                            Room& room) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, quad = lane % 4;
  const int rows = request_rows<kRagged>(a, item.request);
  float inverse[1][kOwnRows];
  room.share({inverse_of_row}, inverse);
  const Turn<Element> turn(room.turn);
#pragma unroll
  for (int n = 0; n < kFewRows / 8; ++n) {
    uint4 v[kHalfTiles / 2];
#pragma unroll
    for (int i = 0; i < kHalfTiles / 2; ++i) {
      turn.put(o, n, i, inverse[0]);
      v[i] = turn.get_columns(i);
    }
    const int row = 8 * n + lane / 4;
    if (row < rows) {
      auto* const out = static_cast<Element*>(a.out) +
                        output_row<kRagged>(a, item.request, kv_head, row) * kLatent +
                        half * (kLatent / 2) + 64 * (quad / 2) + 16 * warp + 8 * (quad % 2);
#pragma unroll
      for (int i = 0; i < kHalfTiles / 2; ++i) *reinterpret_cast<uint4*>(out + 128 * i) = v[i];
    }
  }
}

// To the partial results, whole vectors of a thread side by side with those of its quad; see
// column_block. `largest`: of this side.
template <bool kRagged>
__device__ __forceinline__ void store_partial(const DecodeArguments& a, const Item& item,
                                              int kv_head, int half, const Output& o,
                                              float inverse_of_row, Room& room,
                                              ByWarp<Maximum>& largest) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, quad = lane % 4;
  const int rows = request_rows<kRagged>(a, item.request);
  const int64_t first_row = partial_row(a, item.split, kv_head, 0);
  float own[kOwnRows] = {};
#pragma unroll
  for (int tile = 0; tile < kHalfTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < kAccumulator; ++i)
      own[row_index(i)] = fmaxf(own[row_index(i)], fabsf(o[tile][i]));
  }
  largest.put(own);
  ptx::named_barrier_sync(half == 0 ? kLeftGroup : kRightGroup, 128);
  const Fp16Scale scale(largest.get() * inverse_of_row);
  float factor[1][kOwnRows];
  room.share({inverse_of_row * scale.up}, factor);
  const Turn<__half> turn(room.turn);
  __half* const out = a.partial_out + (first_row + lane / 4) * kLatent + half * (kLatent / 2) +
                      64 * warp + 8 * quad;
#pragma unroll
  for (int n = 0; n < kFewRows / 8; ++n) {
    uint32_t v[kHalfTiles / 2][4];
#pragma unroll
    for (int i = 0; i < kHalfTiles / 2; ++i) {
      turn.put(o, n, i, factor[0]);
      turn.get_pairs(i, v[i]);
    }
    if (8 * n + lane / 4 < rows) {
#pragma unroll
      for (int i = 0; i < kHalfTiles / 2; ++i)
        *reinterpret_cast<uint4*>(out + 8 * n * kLatent + 32 * i) =
            make_uint4(v[i][0], v[i][1], v[i][2], v[i][3]);
    }
  }
  if (warp == 0 && lane < min(rows, kFewRows))
    a.partial_lse[first_row + lane].scale[half] = __float_as_uint(scale.down) >> 16;
}

}  // namespace flashmla::few_rows
