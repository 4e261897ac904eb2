// Additions that the memory itself does; nothing is returned, so nothing is waited for.
#pragma once

namespace flashmla::ptx {

// Rounds to nearest; numbers too small for a normal float are zero (PTX: red).
__device__ __forceinline__ void add_to_global(float4* to, float4 x) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x.x),
               "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}

__device__ __forceinline__ void add_to_global(float2* to, float2 x) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x.x), "f"(x.y)
               : "memory");
}

}  // namespace flashmla::ptx
