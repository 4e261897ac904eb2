// A line that was discarded holds nothing any more: here it is overwritten.
#pragma once

#include <cuda_fp16.h>

#include <cstring>

namespace flashmla::ptx {

template <typename Vector>
Vector load_kept(const Vector* from) {
  return *from;
}
template <typename Vector>
void store_kept(Vector* to, Vector x) {
  *to = x;
}
inline void discard_line(const void* line) { std::memset(const_cast<void*>(line), 0xff, 128); }

}  // namespace flashmla::ptx
