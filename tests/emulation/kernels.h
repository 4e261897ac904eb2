// What whole kernels need beside threads, to run one thread block after the other.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda_threads.h"

#define __global__
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
  int x, y, z;
};
inline Index blockIdx, gridDim;

namespace emulation {

// Of each thread of a block, whether it has waited for the kernel before.
inline std::vector<bool>& has_waited() {
  static std::vector<bool> waited(1024);
  return waited;
}

inline void expect_wait() {
  if (has_waited()[threadIdx.x]) return;
  std::fprintf(stderr, "emulation: a thread has not waited for the kernel before\n");
  std::abort();
}

// Runs a kernel's block, every thread of which has to wait before it ends.
inline void run_waiting(Block& block, const std::function<void()>& kernel, Order order) {
  has_waited().assign(1024, false);
  block.run(
      [&] {
        kernel();
        expect_wait();
      },
      order);
}

// Of the GPU, and so aligned to its cache lines; full of NaN.
struct Memory {
  explicit Memory(size_t size)
      : bytes(static_cast<uint8_t*>(std::aligned_alloc(128, (size + 127) / 128 * 128))) {
    std::memset(bytes, 0xff, size);
  }
  Memory(const Memory&) = delete;
  ~Memory() { std::free(bytes); }
  uint8_t* const bytes;
};

inline double value_of(__half x) { return x.value; }
inline double value_of(__nv_bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

}  // namespace emulation

inline unsigned __float2uint_rn(float x) {
  return std::isnan(x) ? 0 : static_cast<unsigned>(std::nearbyint(x));
}

// What the kernel before writes is read by such loads.
template <typename T>
T __ldcs(const T* from) {
  emulation::expect_wait();
  return *from;
}
