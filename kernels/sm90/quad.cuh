// What the four threads do together that hold a row of an accumulator.
#pragma once

#include <cstdint>

namespace flashmla {

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Word j of thread i goes to word i of thread j, among the four threads of a quad.
__device__ __forceinline__ void transpose_quad(uint32_t (&v)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; step <<= 1) {
    const bool high = threadIdx.x & step;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & step) continue;
      const uint32_t received = __shfl_xor_sync(~0u, high ? v[j] : v[j + step], step);
      (high ? v[j] : v[j + step]) = received;
    }
  }
}

}  // namespace flashmla
