// Thread-block clusters: the cluster-wide barrier, and stores and arrivals in a peer's shared
// memory.
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

// Waits for the whole cluster, which makes nobody's writes visible: that would be a barrier of the
// memory of the whole GPU.
__device__ __forceinline__ void cluster_sync_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
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

// Arrives at the barrier that lies there in block `rank`, which may be this one. Orders nothing for
// other blocks.
__device__ __forceinline__ void mbarrier_arrive_at(Mbarrier* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(smem_address(barrier)),
      "r"(rank)
      : "memory");
}

}  // namespace flashmla::ptx
