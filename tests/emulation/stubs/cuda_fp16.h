// fp16 and CUDA's vectors on the host: every operation rounds once, to nearest.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  _Float16 value;
};
struct __half2 {
  _Float16 x, y;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// Sums of products of fp16 values and powers of two are exact in double, if nothing underflows.
inline _Float16 to_half(double x) { return static_cast<_Float16>(x); }
inline float2 __half22float2(const __half2& v) { return {float(v.x), float(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {to_half(x), to_half(y)}; }
inline __half2 __float2half2_rn(float x) { return {to_half(x), to_half(x)}; }
inline __half2 __low2half2(const __half2& v) { return {v.x, v.x}; }
inline __half2 __high2half2(const __half2& v) { return {v.y, v.y}; }
inline __half2 __hmul2_rn(const __half2& a, const __half2& b) {
  return {to_half(double(a.x) * double(b.x)), to_half(double(a.y) * double(b.y))};
}
inline __half2 __hfma2(const __half2& a, const __half2& b, const __half2& c) {
  return {to_half(double(a.x) * double(b.x) + double(c.x)),
          to_half(double(a.y) * double(b.y) + double(c.y))};
}

inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }

template <typename To, typename From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline int __float_as_int(float x) { return same_bits<int>(x); }
inline uint32_t __float_as_uint(float x) { return same_bits<uint32_t>(x); }
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline float __uint_as_float(uint32_t x) { return same_bits<float>(x); }

template <typename T>
T __ldg(const T* from) {
  return *from;
}
using std::max;
using std::min;
