// Matrices of 8 x 8 16-bit elements, four at a time, that a warp holds: thread i has elements
// 2 (i % 4) + {0, 1} of row i / 4 of each. In shared memory a row of 16 bytes lies at the address
// that one thread names: row i % 8 of matrix i / 8 at that of thread i (PTX ISA, "stmatrix",
// "ldmatrix").
#pragma once

#include <cstdint>

namespace flashmla::ptx {

// Rows of memory are columns of the matrices.
__device__ __forceinline__ void store_transposed(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
      : "memory");
}

__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

}  // namespace flashmla::ptx
