// wgmma on 128-byte-swizzled tiles of 64 rows x 64 columns (8 KB, 16-bit elements), the one layout
// used here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "sm90/ptx/mbarrier.cuh"

namespace flashmla::ptx {

constexpr int kTileBytes = 64 * 64 * 2;

// Shared-memory matrix descriptor (PTX ISA, "Matrix descriptor"): 128-byte swizzle, 8 rows of 128 B
// per 1,024 B. `tile_stride` is the distance of 64-column tiles when the operand's contiguous
// dimension spans several.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* tile, uint32_t tile_stride) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  constexpr uint64_t kRowGroupStride = 1024 >> 4;
  uint64_t descriptor = kSwizzle128 | kRowGroupStride << 32 |
                        static_cast<uint64_t>(tile_stride >> 4) << 16 |
                        (smem_address(tile) >> 4 & 0x3fff);  // without the rank in the cluster
  // Opaque, or the compiler keeps every step's descriptor in registers of its own.
  asm volatile("" : "+l"(descriptor));
  return descriptor;
}

// Steps of a descriptor's address, in its unit of 16 bytes.
constexpr uint64_t kNextColumns16 = 32 >> 4;     // 16 columns further inside a tile
constexpr uint64_t kNextRows16 = 16 * 128 >> 4;  // 16 rows further inside a tile
constexpr uint64_t kNextTile = kTileBytes >> 4;

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses to accumulators across the surrounding asynchronous work.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// Accumulators that nobody reads any more. A product that replaces them names them as inputs all
// the same: without a value here they would keep their registers until then.
__device__ __forceinline__ void forget_register(float& value) {
  asm volatile("mov.b32 %0, 0;" : "=f"(value));
}

template <int kCount>
__device__ __forceinline__ void forget_registers(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) forget_register(values[i]);
}

// Keeps the compiler from working out a value again where it is used.
__device__ __forceinline__ void pin_register(int& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void pin_register(const uint16_t*& value) {
  asm volatile("" : "+l"(value));
}

using cute::SM90::GMMA::Major;
using cute::SM90::GMMA::ScaleOut;

template <typename Element>
struct Wgmma;

template <>
struct Wgmma<__nv_bfloat16> {
  using Scores = cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<Major::K, Major::K>;
  using ScoresFromRegisters = cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<Major::K, Major::K>;
  using Values = cute::SM90::GMMA::MMA_64x256x16_F32BF16BF16_RS<Major::K, Major::MN>;
  // Of few rows, as B.
  using FewScores = cute::SM90::GMMA::MMA_64x16x16_F32BF16BF16_SS<Major::K, Major::K>;
  using FewValues = cute::SM90::GMMA::MMA_64x16x16_F32BF16BF16_SS<Major::MN, Major::K>;
};

template <>
struct Wgmma<__half> {
  using Scores = cute::SM90::GMMA::MMA_64x64x16_F32F16F16_SS<Major::K, Major::K>;
  using ScoresFromRegisters = cute::SM90::GMMA::MMA_64x64x16_F32F16F16_RS<Major::K, Major::K>;
  using Values = cute::SM90::GMMA::MMA_64x256x16_F32F16F16_RS<Major::K, Major::MN>;
  // Of few rows, as B.
  using FewScores = cute::SM90::GMMA::MMA_64x16x16_F32F16F16_SS<Major::K, Major::K>;
  using FewValues = cute::SM90::GMMA::MMA_64x16x16_F32F16F16_SS<Major::MN, Major::K>;
};

template <typename Mma, int kCount, size_t... kIndex>
__device__ __forceinline__ void mma_from_shared(uint64_t a, uint64_t b, float (&c)[kCount],
                                                bool accumulate, std::index_sequence<kIndex...>) {
  Mma::fma(a, b, c[kIndex]..., accumulate ? ScaleOut::One : ScaleOut::Zero);
}

template <typename Mma, int kCount, size_t... kIndex>
__device__ __forceinline__ void mma_from_registers(const uint32_t (&a)[4], uint64_t b,
                                                   float (&c)[kCount], bool accumulate,
                                                   std::index_sequence<kIndex...>) {
  Mma::fma(a[0], a[1], a[2], a[3], b, c[kIndex]..., accumulate ? ScaleOut::One : ScaleOut::Zero);
}

// c [64, N] (+)= A [64, 16] B, both from shared memory.
template <typename Mma, int kCount>
__device__ __forceinline__ void mma(uint64_t a, uint64_t b, float (&c)[kCount], bool accumulate) {
  mma_from_shared<Mma>(a, b, c, accumulate, std::make_index_sequence<kCount>{});
}

// The same with A in registers.
template <typename Mma, int kCount>
__device__ __forceinline__ void mma(const uint32_t (&a)[4], uint64_t b, float (&c)[kCount],
                                    bool accumulate) {
  mma_from_registers<Mma>(a, b, c, accumulate, std::make_index_sequence<kCount>{});
}

}  // namespace flashmla::ptx
