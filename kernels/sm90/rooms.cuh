// Batch-invariant mode: where the nodes of a thread block's subtrees wait for their siblings, in
// global memory. The combine kernel merges what several thread blocks computed.
#pragma once

#include "sm90/decode_shared.cuh"
#include "sm90/node.cuh"
#include "sm90/ptx/keep.cuh"

namespace flashmla {

// A room for each size of subtree. It holds O of the left half, then of the right, then the states
// of both, each thread's vectors as a warp stores them side by side.
template <int kThreadRows>
class Rooms {
 public:
  using Node = flashmla::Node<kThreadRows>;
  using State = std::conditional_t<kThreadRows == 1, uint2, uint4>;  // sum and exponent of each row
  static constexpr int kVectors = sizeof(Node::words) / (sizeof(uint4));  // of a thread
  static constexpr int kValueBytes = kVectors * 32 * sizeof(uint4);       // of a warp
  static constexpr int kStateBytes = 32 * sizeof(State);
  static constexpr int kWarpBytes = 2 * (kValueBytes + kStateBytes);
  static_assert(kWarpBytes == 4 * FLASHMLA_ROOM_FLOATS_OF_16_ROWS * kThreadRows / 2,
                "as callers allocate");
  static_assert(sizeof(Node::rows) == sizeof(State));

  __device__ __forceinline__ Rooms(const DecodeArguments& a, int row_begin)
      : thread_(threadIdx.x % 128),
        warps_(warps_of(a.rows - row_begin)),
        real_(kThreadRows == 1 ? accumulator_row<1>(0) < a.rows : thread_ / 32 < warps_) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int levels = 31 - __clz(a.max_leaves);
    stride_ = warps_of(a.rows) * kWarpBytes;
    own_ = a.rooms + static_cast<int64_t>(block) * levels * stride_;
  }

  // Leaves a node to wait; `half` of O: 0 left, 1 right.
  __device__ __forceinline__ void store(int level, int half, const Node& node) const {
    uint4* const to = values(level, half);
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (real_) ptx::store_kept(to + 32 * i, node.vector(i));
    if (real_) ptx::store_kept(states(level, half), packed(node.rows));
  }

  // Takes up what waits in the rooms that are bits of `levels`, the lowest first.
  __device__ __forceinline__ void merge(uint32_t levels, int half, Node& node) const {
#pragma unroll 1
    for (; levels != 0; levels &= levels - 1) {
      const int level = __ffs(levels) - 1;
      const State state = load(states(level, half));
      const uint4* const from = values(level, half);
      uint4 x[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) x[i] = load(from + 32 * i);
      SiblingWeights weights[kThreadRows];
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) weights[r] = {unpacked(state, r), node.rows[r]};
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const uint32_t waiting[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j)
          node.words[4 * i + j] = weights[i / 8].merge(waiting[j], node.words[4 * i + j]);
      }
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) node.rows[r] = weights[r].state;
      discard(from);
    }
  }

  // Takes up what waits for the last node of a request, unpacked: then it is the root, which is not
  // rounded.
  __device__ __forceinline__ void merge_root(int level, int half, NodeState (&rows)[kThreadRows],
                                             float (&o)[128]) const {
    constexpr int kInFlight = 8;
    const State state = load(states(level, half));
    const uint4* const from = values(level, half);
    SiblingWeights weights[kThreadRows];
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) weights[r] = {unpacked(state, r), rows[r]};
#pragma unroll
    for (int batch = 0; batch < kVectors; batch += kInFlight) {
      // Always so: no number has all bits set, NaN neither. Or the compiler would start more loads
      // at once than there are registers for.
      const bool merged =
          batch == 0 || __float_as_uint(o[Node::accumulator_pair(4 * batch - 1)]) != ~0u;
      uint4 x[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i)
        x[i] = real_ && merged ? ptx::load_kept(from + 32 * (batch + i)) : uint4{};
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const uint32_t waiting[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int word = 4 * (batch + i) + j;
          float* const own = o + Node::accumulator_pair(word);
          const float2 root = weights[word / 32].merge_root(waiting[j], {own[0], own[1]});
          own[0] = root.x, own[1] = root.y;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) rows[r] = weights[r].state;
    discard(from);
  }

 private:
  __device__ __forceinline__ static uint2 packed(const NodeState (&rows)[1]) {
    return make_uint2(__float_as_uint(rows[0].sum), rows[0].exponent);
  }
  __device__ __forceinline__ static uint4 packed(const NodeState (&rows)[2]) {
    return make_uint4(__float_as_uint(rows[0].sum), rows[0].exponent, __float_as_uint(rows[1].sum),
                      rows[1].exponent);
  }
  __device__ __forceinline__ static NodeState unpacked(const uint2& state, int) {
    return {__uint_as_float(state.x), static_cast<int>(state.y)};
  }
  __device__ __forceinline__ static NodeState unpacked(const uint4& state, int row) {
    return {__uint_as_float(row == 0 ? state.x : state.z),
            static_cast<int>(row == 0 ? state.y : state.w)};
  }

  // Nobody reads it again before it is written again.
  __device__ __forceinline__ void discard(const uint4* from) const {
    __syncwarp();
    if (real_ && thread_ % 8 == 0) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) ptx::discard_line(from + 32 * i);
    }
  }

  template <typename Vector>
  __device__ __forceinline__ Vector load(const Vector* from) const {
    return real_ ? ptx::load_kept(from) : Vector{};
  }
  __device__ __forceinline__ static int warps_of(int rows) {
    return kThreadRows == 1 ? 4 : (min(kTileRows, rows) + 15) / 16;
  }
  __device__ __forceinline__ uint8_t* room(int level) const { return own_ + level * stride_; }
  __device__ __forceinline__ uint4* values(int level, int half) const {
    return reinterpret_cast<uint4*>(room(level) + half * warps_ * kValueBytes) +
           (thread_ / 32 * kVectors * 32 + thread_ % 32);
  }
  __device__ __forceinline__ State* states(int level, int half) const {
    return reinterpret_cast<State*>(room(level) + 2 * warps_ * kValueBytes) +
           (half * warps_ * 32 + thread_);
  }

  int thread_;  // of the warpgroup
  int warps_;   // that a room has places for
  bool real_;   // whether this thread's row exists, or of two a thread any of its warp's
  int stride_;
  uint8_t* own_;
};

}  // namespace flashmla
