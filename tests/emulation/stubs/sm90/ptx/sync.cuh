// One kernel runs alone.
#pragma once

namespace flashmla::ptx {

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

}  // namespace flashmla::ptx
