// One kernel runs alone; whether each thread waits for the one before is watched.
#pragma once

#include "kernels.h"

namespace flashmla::ptx {

inline void wait_for_previous_kernel() { emulation::has_waited()[threadIdx.x] = true; }
inline void let_next_kernel_start() {}

}  // namespace flashmla::ptx
