// From the accumulators of the decode kernel to memory.
#pragma once

#include "sm90/decode_shared.cuh"
#include "sm90/softmax.cuh"

namespace flashmla {

__device__ __forceinline__ void pin_words(uint32_t (&v)[4][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(v[i / 4][i % 4]));
}

// One row of O, 256 columns from `out` on: this thread's o[4 n + 2 r + {0, 1}] are columns
// 8 n + 2 (lane % 4) + {0, 1}. A quad writes its vectors side by side, in the order of columns only
// if kInOrder: what is read back by vectors need not be. All values of a batch are ready before its
// first store, or each store would wait for the registers of the one before.
template <typename Element, bool kInOrder>
__device__ __forceinline__ void store_row(Element* out, bool valid, int r, const float (&o)[128],
                                          float inverse_sum) {
  const int quad = threadIdx.x % 4;
#pragma unroll
  for (int batch = 0; batch < 32; batch += 16) {
    uint32_t v[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int x = 4 * (batch + 4 * i + j) + 2 * r;
        v[i][j] = pack<Element>(o[x] * inverse_sum, o[x + 1] * inverse_sum);
      }
      if (kInOrder) transpose_quad(v[i]);  // each thread then owns 16 contiguous bytes
    }
    pin_words(v);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (valid)
        *reinterpret_cast<uint4*>(out + 8 * (batch + 4 * i + quad)) =
            make_uint4(v[i][0], v[i][1], v[i][2], v[i][3]);
    }
  }
}

// The power of two that brings a row's largest magnitude to 2^14 .. 2^15, so that fp16 holds all
// but the tiniest of its values in full precision; and its inverse.
struct Fp16Scale {
  float up, down;

  __device__ __forceinline__ explicit Fp16Scale(float largest) {
    const int exponent = __float_as_uint(largest) >> 23;  // of 255: infinite, or not a number
    const int up_exponent = exponent == 255 ? 127 : min(127 + 14 - (exponent - 127), 230);
    up = __uint_as_float(up_exponent << 23);
    down = __uint_as_float((254 - up_exponent) << 23);
  }
};

// The largest magnitude among a row's 256 columns.
__device__ __forceinline__ float largest_of_row(const float (&o)[128], int r) {
  float largest[4] = {};
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    largest[i % 4] = fmaxf(largest[i % 4], fabsf(o[4 * (i / 2) + 2 * r + i % 2]));
  }
  return quad_max(fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3])));
}

// One half of O, [64, 256] of this warpgroup, to the output or to the partial results; there as
// fp16, since writing and reading them back is what cutting costs.
template <typename Element, bool kRagged, int kThreadRows>
__device__ __forceinline__ void store_output(const DecodeArguments& a, const Item& item,
                                             int kv_head, int row_begin, int half,
                                             const float (&o)[128],
                                             const float (&inverse_sum)[kThreadRows]) {
  const int column = half * (kLatent / 2);
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    const int rows = request_rows<kRagged>(a, item.request);
    const int row = min(row_begin + accumulator_row<kThreadRows>(r), rows - 1);
    const bool valid = row_begin + accumulator_row<kThreadRows>(r) < rows;
    if (item.split < 0) {
      store_row<Element, true>(static_cast<Element*>(a.out) +
                                   output_row<kRagged>(a, item.request, kv_head, row) * kLatent +
                                   column,
                               valid, r, o, inverse_sum[r]);
      continue;
    }
    const int64_t partial = partial_row(a, item.split, kv_head, row);
    const Fp16Scale scale(largest_of_row(o, r) * inverse_sum[r]);
    store_row<__half, false>(a.partial_out + partial * kLatent + column, valid, r, o,
                             inverse_sum[r] * scale.up);
    if (valid && threadIdx.x % 4 == 0)
      a.partial_lse[partial].scale[half] = __float_as_uint(scale.down) >> 16;
  }
}

// Out and LSE of a request without tokens; all 256 consumer threads.
template <typename Element, bool kRagged>
__device__ __forceinline__ void store_empty(const DecodeArguments& a, const Item& item, int kv_head,
                                            int row_begin) {
  const int thread = threadIdx.x - 128;
  const int rows = min(kTileRows, request_rows<kRagged>(a, item.request) - row_begin);
#pragma unroll 1
  for (int i = thread; i < rows * kLatent / 8; i += 256) {
    const int64_t row =
        output_row<kRagged>(a, item.request, kv_head, row_begin + i / (kLatent / 8));
    reinterpret_cast<uint4*>(static_cast<Element*>(a.out) + row * kLatent)[i % (kLatent / 8)] =
        uint4{};
  }
  if (thread < rows)
    a.lse[output_row<kRagged>(a, item.request, kv_head, row_begin + thread)] = kNegativeInfinity;
}

}  // namespace flashmla
