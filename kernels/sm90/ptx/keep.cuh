// Global memory that the L2 cache should keep while other data streams through it.
#pragma once

#include <cstdint>

namespace flashmla::ptx {

constexpr uint64_t kEvictLast = 0x14F0000000000000;  // cache policy

__device__ __forceinline__ float4 load_kept(const float4* from) {
  float4 x;
  asm volatile("ld.global.cg.L2::cache_hint.v4.f32 {%0, %1, %2, %3}, [%4], %5;"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(from), "l"(kEvictLast)
               : "memory");
  return x;
}

__device__ __forceinline__ void store_kept(float4* to, float4 x) {
  asm volatile("st.global.cg.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "f"(x.x),
               "f"(x.y), "f"(x.z), "f"(x.w), "l"(kEvictLast)
               : "memory");
}

__device__ __forceinline__ void store_kept(float2* to, float2 x) {
  asm volatile("st.global.cg.L2::cache_hint.v2.f32 [%0], {%1, %2}, %3;" ::"l"(to), "f"(x.x),
               "f"(x.y), "l"(kEvictLast)
               : "memory");
}

// L2 need not write these 128 bytes, a line, to memory: nobody reads them before they are written
// again (PTX: discard).
__device__ __forceinline__ void discard_line(const void* line) {
  asm volatile("discard.global.L2 [%0], 128;" ::"l"(line) : "memory");
}

// Additions that the memory does: nothing is returned, so nothing is waited for. They round to
// nearest; numbers too small for a normal float are zero (PTX: red).
__device__ __forceinline__ void add_kept(float4* to, float4 x) {
  asm volatile(
      "red.relaxed.gpu.global.add.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to),
      "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "l"(kEvictLast)
      : "memory");
}

__device__ __forceinline__ void add_kept(float2* to, float2 x) {
  asm volatile("red.relaxed.gpu.global.add.L2::cache_hint.v2.f32 [%0], {%1, %2}, %3;" ::"l"(to),
               "f"(x.x), "f"(x.y), "l"(kEvictLast)
               : "memory");
}

}  // namespace flashmla::ptx
