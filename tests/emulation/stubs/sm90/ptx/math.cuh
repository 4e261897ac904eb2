// The machine's approximations are within a few units of the last place of these.
#pragma once

#include <cmath>

namespace flashmla::ptx {

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline float max_or_nan(float x, float y) {
  return std::isnan(x) || std::isnan(y) ? std::nanf("") : std::fmax(x, y);
}

}  // namespace flashmla::ptx
