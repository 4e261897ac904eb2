// Of the tensor cores' header what others use. Accumulators that are forgotten become NaN.
#pragma once

#include <cmath>

namespace flashmla::ptx {

constexpr int kTileBytes = 64 * 64 * 2;

template <int kCount>
void forget_registers(float (&values)[kCount]) {
  for (float& value : values) value = std::nanf("");
}

}  // namespace flashmla::ptx
