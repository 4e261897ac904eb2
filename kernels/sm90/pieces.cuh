// The partial results of a slice that a warp of the combine kernel merges.
#pragma once

#include "sm90/slice.cuh"

namespace flashmla {

// Where those lie that it asks for first is worked out before they are there: what stands between
// the wait for them and the first load is felt.
template <int kWords, int kInFlight>
class Pieces {
 public:
  using Vectors = Vector<kWords>[kInFlight];
  const int count;

  // `states` lie `stride` apart.
  __device__ __forceinline__ Pieces(const Slices<kWords>& slices, const PartialState* states,
                                    int stride, int count)
      : count(count),
        slices_(slices),
        own_state_(reinterpret_cast<const uint2*>(states) + int64_t{threadIdx.x % 32} * stride),
        stride_(stride) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) first_[i] = slices.own + i * slices.stride;
  }
  __device__ __forceinline__ void use_pointers() const {
    ptx::use_pointer(own_state_);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) ptx::use_pointer(first_[i]);
  }

  // Of piece `base` + lane.
  __device__ __forceinline__ uint2 load_state(int base) const {
    uint2 state = make_uint2(__float_as_uint(kNegativeInfinity), 0);
    if (base + static_cast<int>(threadIdx.x % 32) < count)
      state = __ldcs(own_state_ + int64_t{base} * stride_);
    return state;
  }
  __device__ __forceinline__ void load_first(Vectors& x) const {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) x[i] = i < count ? __ldcs(first_[i]) : Vector<kWords>{};
  }
  __device__ __forceinline__ void load(Vectors& x, int first) const {
    slices_.load(x, first, count);
  }
  // Those from `first` on that the warp has read for the last time.
  __device__ __forceinline__ void discard(int first) const {
    slices_.discard(first, min(kInFlight, count - first));
  }

 private:
  Slices<kWords> slices_;
  const uint2* own_state_;  // of the piece of this lane's number
  int stride_;
  const Vector<kWords>* first_[kInFlight];
};

}  // namespace flashmla
