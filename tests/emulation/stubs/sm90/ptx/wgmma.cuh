// Of the tensor cores' header what others use. Accumulators that are forgotten become NaN.
#pragma once

#include <cmath>

namespace flashmla::ptx {

constexpr int kTileBytes = 64 * 64 * 2;

inline void forget_register(float& value) { value = std::nanf(""); }

template <int kCount>
void forget_registers(float (&values)[kCount]) {
  for (float& value : values) forget_register(value);
}

}  // namespace flashmla::ptx
