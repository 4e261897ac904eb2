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

// Where in the cluster's address space block `rank` has what lies at `pointer` in this one.
__device__ __forceinline__ uint32_t address_in_peer(const void* pointer, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(smem_address(pointer)), "r"(rank));
  return address;
}

// *pointer = value in the shared memory of block `rank`, which must have started.
__device__ __forceinline__ void store_to_peer(int64_t* pointer, int rank, int64_t value) {
  asm volatile("st.shared::cluster.s64 [%0], %1;" ::"r"(address_in_peer(pointer, rank)), "l"(value)
               : "memory");
}

// Arrives at the barrier that lies there in block `rank`, which may be this one. Orders nothing for
// other blocks.
__device__ __forceinline__ void mbarrier_arrive_at(Mbarrier* barrier, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in_peer(barrier, rank))
               : "memory");
}

}  // namespace flashmla::ptx
