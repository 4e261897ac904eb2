// A line that was discarded holds nothing any more: here it is overwritten.
#pragma once

#include <cuda_fp16.h>

#include <cstring>

namespace flashmla::ptx {

inline uint4 load_kept(const uint4* from) { return *from; }
inline void store_kept(uint4* to, uint4 x) { *to = x; }
inline void discard_line(const void* line) { std::memset(const_cast<void*>(line), 0xff, 128); }

}  // namespace flashmla::ptx
