// Copies into shared memory: TMA boxes and 16-byte cp.async.
#pragma once

#include <cuda.h>

#include "sm90/ptx/mbarrier.cuh"

namespace flashmla::ptx {

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Cache policies: for data that nobody reads again soon, and for all other.
constexpr uint64_t kEvictFirst = 0x12F0000000000000, kEvictNormal = 0x1000000000000000;

// One box of a 5-D tensor map; its bytes complete on `barrier`.
__device__ __forceinline__ void tma_load_5d(void* destination, const CUtensorMap* map,
                                            Mbarrier* barrier, int c0, int c1, int c2, int c3,
                                            int c4, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(smem_address(destination)),
      "l"(map), "r"(smem_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"(policy)
      : "memory");
}

// The same into every thread block of the cluster whose bit of `blocks` is set, at the offsets that
// destination and barrier have in this one.
__device__ __forceinline__ void tma_multicast_5d(void* destination, const CUtensorMap* map,
                                                 Mbarrier* barrier, int c0, int c1, int c2, int c3,
                                                 int c4, uint16_t blocks, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8, %9;" ::"r"(smem_address(destination)),
      "l"(map), "r"(smem_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4),
      "h"(blocks), "l"(policy)
      : "memory");
}

// `to`: an address in shared memory. Bytes from there and from `from` are part of the instruction.
template <int kTo, int kFrom>
__device__ __forceinline__ void copy_async_16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;" ::"r"(to), "l"(from), "n"(kTo),
               "n"(kFrom)
               : "memory");
}

// What this thread has asked for since the last time becomes a group.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until no more than the last `kPending` groups are on their way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace flashmla::ptx
