// Batch-invariant mode: adding up the results of leaves.
//
// The decode kernel adds up what one thread block computes, the combine kernel what several did.
// Both do it by the functions below, every rounding of which is spelled out, so that a sum has one
// value wherever it is cut.
#pragma once

#include "sm90/decode_shared.cuh"
#include "sm90/leaves.cuh"
#include "sm90/ptx/keep.cuh"
#include "sm90/softmax.cuh"

namespace flashmla {

// As additions of fp32 to global memory round (PTX: red): numbers too small for a normal float are
// zero.
__device__ __forceinline__ float add_flush(float x, float y) {
  float z;
  asm("add.rn.ftz.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

__device__ __forceinline__ float multiply_flush(float x, float y) {
  float z;
  asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// Adding a row to another. The anchor of the first stays, so that what is there need not be read,
// unless the second is so much larger that nothing of the first would be left.
struct Addition {
  RowState state;  // of both
  float factor;    // of the second
  bool replaces;

  __device__ __forceinline__ Addition(const RowState& first, const RowState& second) {
    constexpr float kMostGrowth = 40.0f;
    const bool nothing = second.sum == 0.0f;
    const float growth = __fsub_rn(second.anchor, first.anchor);
    replaces = first.sum == 0.0f || (!nothing && growth > kMostGrowth);
    factor = nothing ? 0.0f : replaces ? 1.0f : exp2_fast(growth);
    const float added = multiply_flush(second.sum, factor);
    state.anchor = replaces ? second.anchor : first.anchor;
    state.sum = replaces ? added : add_flush(first.sum, added);
  }

  // Values of a row that saw no token must be zero.
  __device__ __forceinline__ float sum(float first, float second) const {
    const float scaled = multiply_flush(second, factor);
    return replaces ? scaled : add_flush(first, scaled);
  }
};

// What waits in global memory. A thread reads only what it wrote: its 128 values of O as vectors
// that a warp stores side by side, then the state of its two rows.
//
// Leaves are added to the room of their half by the memory itself: reading it would be waited for.
class Rooms {
 public:
  // `half` of O: 0 left, 1 right.
  __device__ __forceinline__ Rooms(const DecodeArguments& a, int row_begin, int half) {
    const int warp = threadIdx.x % 128 / 32, warps = (min(kTileRows, a.rows) + 15) / 16;
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    real_ = row_begin + 16 * warp < a.rows;
    stride_ = 2 * warps * kVectors * 32;
    own_ = a.rooms + static_cast<int64_t>(block) * 2 * stride_ +
           (half * warps + warp) * kVectors * 32 + threadIdx.x % 32;
  }

  // Adds a leaf to the room of its half; `o` is used up.
  __device__ __forceinline__ void add(const LeafPlace& place, float (&o)[128],
                                      const RowState (&leaf)[2]) const {
    float4* room = own_ + place.half * stride_;
    const float4 held = place.opens ? float4{} : load(room + 32 * kValues);
    const Addition rows[2] = {{{held.x, held.y}, leaf[0]}, {{held.z, held.w}, leaf[1]}};
    store_state(room, rows[0].state, rows[1].state);
    clear_empty_rows(o, leaf);
#pragma unroll
    for (int i = 0; i < 128; ++i) o[i] = multiply_flush(o[i], rows[(i >> 1) & 1].factor);
    const bool replaces = real_ && rows[0].replaces && rows[1].replaces;
    const bool adds = real_ && !rows[0].replaces && !rows[1].replaces;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (replaces) ptx::store_kept(room + 32 * i, vector(o, i));
      if (adds) ptx::add_kept(room + 32 * i, vector(o, i));
    }
    if (real_ && !replaces && !adds) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        auto* pair = reinterpret_cast<float2*>(room + 32 * i);
        add_row(rows[0].replaces, pair, {o[4 * i], o[4 * i + 1]});
        add_row(rows[1].replaces, pair + 1, {o[4 * i + 2], o[4 * i + 3]});
      }
    }
  }

  // Adds the last leaf of an item to what waits. Afterwards `o` and `state` are those of the item.
  __device__ __forceinline__ void complete(const LeafPlace& place, float (&o)[128],
                                           RowState (&state)[2]) const {
    clear_empty_rows(o, state);
#pragma unroll 1
    for (int half = place.opens ? place.half - 1 : place.half; half >= place.first_half; --half) {
      add_room(half, o, state);
    }
  }

 private:
  static constexpr int kValues = 128 / 4;  // vectors of O
  static constexpr int kVectors = kValues + 1;
  static constexpr int kBatch = 8;  // vectors on their way
  static_assert(2 * kVectors * 32 * 4 == FLASHMLA_ROOM_FLOATS_OF_16_ROWS, "as callers allocate");

  __device__ __forceinline__ void store_state(float4* room, const RowState& first,
                                              const RowState& second) const {
    store(room + 32 * kValues, make_float4(first.anchor, first.sum, second.anchor, second.sum));
  }

  // A row that saw no token gets nothing from it, NaN neither.
  __device__ __forceinline__ static void clear_empty_rows(float (&o)[128],
                                                          const RowState (&state)[2]) {
#pragma unroll
    for (int i = 0; i < 128; ++i) o[i] = state[(i >> 1) & 1].sum == 0.0f ? 0.0f : o[i];
  }

  __device__ __forceinline__ static float4 vector(const float (&o)[128], int i) {
    return make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]);
  }

  __device__ __forceinline__ static void add_row(bool replaces, float2* to, float2 x) {
    if (replaces) {
      ptx::store_kept(to, x);
    } else {
      ptx::add_kept(to, x);
    }
  }

  __device__ __forceinline__ void add_room(int number, float (&o)[128],
                                           RowState (&state)[2]) const {
    const float4* room = own_ + number * stride_;
    const float4 held = load(room + 32 * kValues);
    const Addition rows[2] = {{{held.x, held.y}, state[0]}, {{held.z, held.w}, state[1]}};
    state[0] = rows[0].state, state[1] = rows[1].state;
#pragma unroll
    for (int batch = 0; batch < kValues; batch += kBatch) {
      float4 x[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) x[i] = load(room + 32 * (batch + i));
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = 4 * (batch + i);
        o[at] = rows[0].sum(x[i].x, o[at]);
        o[at + 1] = rows[0].sum(x[i].y, o[at + 1]);
        o[at + 2] = rows[1].sum(x[i].z, o[at + 2]);
        o[at + 3] = rows[1].sum(x[i].w, o[at + 3]);
      }
    }
  }

  // Only for rows that exist; a branch around all would take registers that O needs.
  __device__ __forceinline__ float4 load(const float4* from) const {
    return real_ ? ptx::load_kept(from) : float4{};
  }

  __device__ __forceinline__ void store(float4* to, float4 x) const {
    if (real_) ptx::store_kept(to, x);
  }

  bool real_;
  float4* own_;
  int stride_;
};

}  // namespace flashmla
