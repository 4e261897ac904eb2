// What the decode kernel of few rows has in common: which rows are a thread's, and where warps
// meet.
//
// Operands of both products are exchanged: rows of Q are columns of the accumulators, tokens (of S)
// or latent columns (of O) their rows. As rows of an accumulator there would be 64, whatever their
// number.
//
// A thread holds rows lane / 4 and lane / 4 + 8 of its warp's sixteen, of the columns, which are
// query rows, 8 n + 2 (lane % 4) + {0, 1}: x[4 n + 0, 1] belong to the first, x[4 n + 2, 3] to the
// second.
#pragma once

#include "sm90/decode_shared.cuh"
#include "sm90/queries.cuh"

namespace flashmla::few_rows {

constexpr int kOwnRows = kFewRows / 4;      // query rows that a thread holds some of
constexpr int kAccumulator = kFewRows / 2;  // values of a thread

// The query row that is a thread's r-th.
__device__ __forceinline__ int own_row(int r) {
  return 8 * (r / 2) + 2 * (threadIdx.x % 4) + r % 2;
}

// Which of a thread's query rows its x[i] belongs to, and to which row of the accumulator.
__device__ __forceinline__ constexpr int row_index(int i) { return i / 4 * 2 + i % 2; }
__device__ __forceinline__ int accumulator_row(int i) {
  return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
}

// What concerns a whole row is worked out by one lane of each warp, not by all that hold some of
// it: the row of that number. Instructions are what a short call feels.
__device__ __forceinline__ int row_of_lane() { return threadIdx.x % kFewRows; }

// A number for each query row, those of a thread side by side.
struct alignas(16) Line {
  float x[kFewRows];

  __device__ __forceinline__ static int place_of(int row) {
    return row / 2 % 4 * kOwnRows + row / 8 * 2 + row % 2;
  }
  __device__ __forceinline__ void load_own(float (&own)[kOwnRows]) const {
    static_assert(kOwnRows == 4);
    const float4 v = reinterpret_cast<const float4*>(x)[threadIdx.x % 4];
    own[0] = v.x, own[1] = v.y, own[2] = v.z, own[3] = v.w;
  }
};

struct Maximum {
  __device__ __forceinline__ static float of(float x, float y) { return fmaxf(x, y); }
};

struct Sum {
  __device__ __forceinline__ static float of(float x, float y) { return x + y; }
};

// Maxima or sums of a group's warps, each of its part of the query rows.
template <typename Reduction>
struct ByWarp {
  Line lines[4];

  // Of a warp's threads that hold some of the same rows: each gives two of its rows away, then one,
  // and the two that are left with the same one agree on it.
  __device__ __forceinline__ void put(const float (&own)[kOwnRows]) {
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const bool upper = lane & 16, second = lane & 8;
    float two[2];
#pragma unroll
    for (int r = 0; r < 2; ++r)
      two[r] = exchange(upper ? own[r + 2] : own[r], upper ? own[r] : own[r + 2], 16);
    const float one = exchange(second ? two[1] : two[0], second ? two[0] : two[1], 8);
    lines[warp].x[lane % 4 * kOwnRows + 2 * upper + second] = exchange(one, one, 4);
  }

  // Of the lane's row, of all warps.
  __device__ __forceinline__ float get() const {
    const int place = Line::place_of(row_of_lane());
    float x = lines[0].x[place];
#pragma unroll
    for (int warp = 1; warp < 4; ++warp) x = Reduction::of(x, lines[warp].x[place]);
    return x;
  }

 private:
  __device__ __forceinline__ static float exchange(float kept, float given, int step) {
    return Reduction::of(kept, __shfl_xor_sync(~0u, given, step));
  }
};

// What a consumer warp has to itself: numbers on their way from the lanes that know a row to those
// that hold some of it, and O on its way out.
union Room {
  Line lines[3];
  uint8_t turn[1024];

  // Each lane's numbers are of its row.
  template <int kCount>
  __device__ __forceinline__ void share(const float (&of_row)[kCount],
                                        float (&own)[kCount][kOwnRows]) {
    static_assert(kCount <= 3);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kCount; ++i) lines[i].x[Line::place_of(row_of_lane())] = of_row[i];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kCount; ++i) lines[i].load_own(own[i]);
    __syncwarp();
  }
};

// Q, and in the room that it leaves what is exchanged among warps.
struct Shared {
  alignas(1024) uint8_t q[FewQueries::kSlots * FewQueries::kTileBytes];
  // Of the left side, when O must be rescaled: of this page's scores, and of sums before it.
  ByWarp<Maximum> maximum;
  ByWarp<Sum> growth;
  Line rescale[kLeftStages];  // factor of O before this page's P V
  // Of the item that ends at this stage.
  ByWarp<Sum> sum[kLeftStages];
  ptx::Mbarrier sum_full[kLeftStages];
  // Magnitude of O. The right side's twice, since the next item's may meet late readers.
  ByWarp<Maximum> left_largest, right_largest[2];
  Room rooms[8];

  __device__ __forceinline__ static Shared& of(DecodeShared& shared) {
    static_assert(sizeof(Shared) <= sizeof(DecodeShared::q));
    return *reinterpret_cast<Shared*>(shared.q[0]);
  }
};

}  // namespace flashmla::few_rows
