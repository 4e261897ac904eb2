// Thread-block clusters: the cluster-wide barrier and stores into a peer's shared memory.
#pragma once

#include "sm90/ptx/mbarrier.cuh"

namespace flashmla::ptx {

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// Arrive releases this thread's writes, wait acquires those of the whole cluster.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// *pointer = value in the shared memory of block `rank`, which must have started.
__device__ __forceinline__ void store_to_peer(int64_t* pointer, int rank, int64_t value) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.s64 [remote], %2;\n"
      "}\n" ::"r"(smem_address(pointer)),
      "r"(rank), "l"(value)
      : "memory");
}

}  // namespace flashmla::ptx
