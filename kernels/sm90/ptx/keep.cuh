// Global memory that the L2 cache should keep while other data streams through it.
#pragma once

#include <cstdint>

namespace flashmla::ptx {

constexpr uint64_t kEvictLast = 0x14F0000000000000;  // cache policy

__device__ __forceinline__ uint4 load_kept(const uint4* from) {
  uint4 x;
  asm volatile("ld.global.cg.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from), "l"(kEvictLast)
               : "memory");
  return x;
}

__device__ __forceinline__ uint2 load_kept(const uint2* from) {
  uint2 x;
  asm volatile("ld.global.cg.L2::cache_hint.v2.b32 {%0, %1}, [%2], %3;"
               : "=r"(x.x), "=r"(x.y)
               : "l"(from), "l"(kEvictLast)
               : "memory");
  return x;
}

__device__ __forceinline__ void store_kept(uint2* to, uint2 x) {
  asm volatile("st.global.cg.L2::cache_hint.v2.b32 [%0], {%1, %2}, %3;" ::"l"(to), "r"(x.x),
               "r"(x.y), "l"(kEvictLast)
               : "memory");
}

__device__ __forceinline__ void store_kept(uint4* to, uint4 x) {
  asm volatile("st.global.cg.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "r"(x.x),
               "r"(x.y), "r"(x.z), "r"(x.w), "l"(kEvictLast)
               : "memory");
}

// L2 need not write these 128 bytes, a line, to memory: nobody reads them before they are written
// again (PTX: discard).
__device__ __forceinline__ void discard_line(const void* line) {
  asm volatile("discard.global.L2 [%0], 128;" ::"l"(line) : "memory");
}

}  // namespace flashmla::ptx
