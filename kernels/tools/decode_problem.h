// A small decode problem on the host, whatever no request owns poisoned, and its answer in double
// precision.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "flashmla/decode.h"

constexpr int kWidth = 576, kLatent = 512;
constexpr int32_t kPoisonPage = 2147480000;  // an entry past the length; following it would fault
constexpr int64_t kPoisonStride = int64_t{1} << 38;  // an allowed one; following it would fault

struct Shape {
  const char* name;
  flashmla_dtype dtype;
  int s_q, h_q, h_kv, page_size;  // s_q: of a request, or the most of any
  bool causal;
  float scale;
  std::vector<int32_t> lengths;
  std::vector<int32_t> queries = {};  // tokens of each request; empty: s_q each

  int batch() const { return static_cast<int>(lengths.size()); }
  bool ragged() const { return !queries.empty(); }
  std::vector<int32_t> query_offsets() const {  // [B + 1]
    std::vector<int32_t> offsets{0};
    for (int i = 0; i < batch(); ++i) offsets.push_back(offsets[i] + (ragged() ? queries[i] : s_q));
    return offsets;
  }
  int tokens() const { return query_offsets().back(); }
  // Past the last one, owned by nobody: where kernels would come that take s_q of every request.
  int spare_tokens() const { return ragged() ? s_q : 0; }
  int rows() const { return s_q * h_q; }  // of one request, or the most of any
  int pages_of(int length) const { return (length + page_size - 1) / page_size; }
  int table_width() const {
    return pages_of(*std::max_element(lengths.begin(), lengths.end())) + 1;
  }
  int num_pages() const {
    int pages = 2;  // that nobody owns
    for (const int length : lengths) pages += pages_of(length);
    return pages;
  }
};

inline uint16_t to_bits(float x, flashmla_dtype dtype) {
  return dtype == FLASHMLA_BF16 ? __bfloat16_as_ushort(__float2bfloat16(x))
                                : __half_as_ushort(__float2half(x));
}

inline float from_bits(uint16_t bits, flashmla_dtype dtype) {
  return dtype == FLASHMLA_BF16 ? __bfloat162float(__ushort_as_bfloat16(bits))
                                : __half2float(__ushort_as_half(bits));
}

struct Problem {
  Shape shape;
  std::vector<uint16_t> q;     // [tokens + spare ones, H_q, 576], NaN in the latter
  std::vector<uint16_t> kv;    // [P, page_size, H_kv, 576], NaN wherever no request has written
  std::vector<int32_t> table;  // [B, W]

  // Where a token of a request lies in kv.
  size_t token(int request, int index, int kv_head) const {
    const size_t page = table[request * shape.table_width() + index / shape.page_size];
    return ((page * shape.page_size + index % shape.page_size) * shape.h_kv + kv_head) * kWidth;
  }
};

inline Problem make_problem(const Shape& shape) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  Problem problem{shape, {}, {}, {}};
  const uint16_t poison = to_bits(std::numeric_limits<float>::quiet_NaN(), shape.dtype);
  problem.q.resize(size_t{1} * shape.tokens() * shape.h_q * kWidth);
  for (auto& x : problem.q) x = to_bits(normal(random), shape.dtype);
  problem.q.resize(problem.q.size() + shape.spare_tokens() * shape.h_q * kWidth, poison);

  problem.kv.assign(size_t{1} * shape.num_pages() * shape.page_size * shape.h_kv * kWidth, poison);
  problem.table.assign(shape.batch() * shape.table_width(), kPoisonPage);
  std::vector<int32_t> pages(shape.num_pages());
  for (size_t i = 0; i < pages.size(); ++i) pages[i] = static_cast<int32_t>(i);
  std::shuffle(pages.begin(), pages.end(), random);
  int taken = 0;
  for (int request = 0; request < shape.batch(); ++request) {
    for (int index = 0; index < shape.lengths[request]; ++index) {
      int32_t& entry = problem.table[request * shape.table_width() + index / shape.page_size];
      if (index % shape.page_size == 0) entry = pages[taken++];
      const size_t row = problem.token(request, index, 0);
      for (int i = 0; i < shape.h_kv * kWidth; ++i)
        problem.kv[row + i] = to_bits(normal(random) / 10, shape.dtype);
    }
  }
  return problem;
}

struct Answer {
  std::vector<double> out;  // [tokens, H_q, 512]
  std::vector<double> lse;  // [tokens, H_q]
};

inline Answer host_decode(const Problem& problem) {
  const Shape& shape = problem.shape;
  const std::vector<int32_t> offsets = shape.query_offsets();
  const int rows = shape.tokens() * shape.h_q;
  Answer answer{std::vector<double>(size_t{1} * rows * kLatent),
                std::vector<double>(rows, -std::numeric_limits<double>::infinity())};
  int request = 0;
  for (int row = 0; row < rows; ++row) {
    const int token = row / shape.h_q;
    if (token == offsets[request + 1]) ++request;
    const int later_queries = offsets[request + 1] - 1 - token;
    const int kv_head = row % shape.h_q / (shape.h_q / shape.h_kv);
    const int length = shape.lengths[request];
    const int visible = shape.causal ? length - later_queries : length;
    if (visible <= 0) continue;
    double q[kWidth];
    for (int i = 0; i < kWidth; ++i)
      q[i] = from_bits(problem.q[size_t{1} * row * kWidth + i], shape.dtype);
    std::vector<double> weights(visible);
    for (int t = 0; t < visible; ++t) {
      const uint16_t* k = &problem.kv[problem.token(request, t, kv_head)];
      double dot = 0;
      for (int i = 0; i < kWidth; ++i) dot += q[i] * from_bits(k[i], shape.dtype);
      weights[t] = dot * shape.scale;
    }
    const double maximum = *std::max_element(weights.begin(), weights.end());
    double sum = 0;
    for (double& weight : weights) sum += weight = std::exp(weight - maximum);
    answer.lse[row] = maximum + std::log(sum);
    double* out = &answer.out[size_t{1} * row * kLatent];
    for (int t = 0; t < visible; ++t) {
      const uint16_t* v = &problem.kv[problem.token(request, t, kv_head)];
      for (int i = 0; i < kLatent; ++i) out[i] += weights[t] / sum * from_bits(v[i], shape.dtype);
    }
  }
  return answer;
}
