// Which requests of a batch were cut, for the combine kernels.
#pragma once

#include "sm90/decode_params.cuh"

namespace flashmla {

struct CutRequest {
  int number, first, count;
};

// The requests of a batch that were cut, found by a whole warp. It holds the offsets of 32
// requests, those of small batches all the time: each further load is a trip that the rest waits
// for.
class CutRequests {
 public:
  __device__ __forceinline__ explicit CutRequests(const DecodeArguments& a)
      : offsets_(a.split_offsets), batch_(a.batch) {
    load(0);
  }

  // Of the whole batch. Before any is asked for: the first 32 must be held.
  __device__ __forceinline__ int count() const {
    int cut = __popc(cut_);
#pragma unroll 4
    for (int group = 32; group < batch_; group += 32) {
      const int request = group + threadIdx.x % 32;
      cut += __popc(__ballot_sync(~0u, offset(request) != offset(request + 1)));
    }
    return cut;
  }

  // The cut request of this rank, which must exist. Ranks must not fall from call to call.
  __device__ __forceinline__ CutRequest operator()(int rank) {
    while (rank - before_ >= __popc(cut_)) {
      before_ += __popc(cut_);
      load(group_ + 32);
    }
    const uint32_t own = 1u << threadIdx.x % 32;
    const bool wanted = (cut_ & own) && __popc(cut_ & (own - 1)) == rank - before_;
    const int lane = __ffs(__ballot_sync(~0u, wanted)) - 1;
    const int first = __shfl_sync(~0u, first_, lane);
    return {group_ + lane, first, __shfl_sync(~0u, next_, lane) - first};
  }

 private:
  // That of requests that do not exist is the last one's end: they are not cut.
  __device__ __forceinline__ int offset(int request) const {
    return __ldg(offsets_ + min(request, batch_));
  }
  __device__ __forceinline__ void load(int group) {
    group_ = group;
    first_ = offset(group + threadIdx.x % 32);
    next_ = offset(group + threadIdx.x % 32 + 1);
    cut_ = __ballot_sync(~0u, first_ != next_);
  }

  const int32_t* offsets_;
  int batch_;
  int group_, before_ = 0;  // whose offsets are held, and the cut requests before it
  int first_, next_;        // this lane's request's
  uint32_t cut_;            // which of the group
};

}  // namespace flashmla
