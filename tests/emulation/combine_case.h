// What the programs share that run a combine kernel: a batch of requests, some of them cut, whose
// partial results are read from stdin and whose outputs are printed.
#pragma once

#include <cstdio>

#include "cuda_threads.h"
#include "kernels.h"
// after the emulated CUDA names
#include "sm90/decode_params.cuh"

namespace emulation {

// Of one KV head and query token. Values are fp16, in the order in which an accumulator's threads
// hold them.
class CombineCase {
 public:
  flashmla::DecodeArguments a{};

  // Reads how many pieces each request was cut into (0: not).
  CombineCase(int batch, int rows)
      : offsets_(read_sums(batch)),
        rows_(static_cast<size_t>(batch) * rows),
        partials_(static_cast<size_t>(offsets_.back()) * rows * kRowBytes),
        out_(rows_ * kRowBytes),
        lse_(rows_, std::nanf("")) {
    a.batch = batch;
    a.split_offsets = offsets_.data();
    a.partial_out = reinterpret_cast<__half*>(partials_.bytes);
    a.out = out_.bytes;
    a.lse = lse_.data();
    a.s_q = a.h_kv = 1;
    a.h_q = a.rows = rows;
    a.group = a.head_rows = a.all_rows = flashmla::Divisor(rows);
  }

  // Reads how many query tokens each request has, of `heads` rows each, no more than all of `rows`:
  // the output holds theirs alone.
  void read_queries(int heads) {
    query_offsets_ = read_sums(a.batch);
    rows_ = static_cast<size_t>(query_offsets_.back()) * heads;
    a.query_offsets = query_offsets_.data();
    a.s_q = a.rows / heads;
    a.h_q = heads;
    a.group = flashmla::Divisor(heads);
  }

  size_t partial_rows() const { return static_cast<size_t>(offsets_.back()) * a.rows; }

  // Reads partial results `first` .. `first + count - 1`, counted in values.
  void read_values(size_t first, int count) {
    for (int i = 0; i < count; ++i) {
      float value;
      if (std::scanf("%f", &value) != 1) std::exit(1);
      a.partial_out[first + i] = {to_half(value)};
    }
  }

  // The kernel's thread blocks, one after the other.
  void run(Block& block, int blocks, bool descending, const std::function<void()>& kernel) const {
    gridDim = {blocks, 1, 1};
    for (blockIdx = {0, 0, 0}; blockIdx.x < blocks; ++blockIdx.x)
      run_waiting(block, kernel, descending ? Order::kDescending : Order::kAscending);
  }

  // Of every row its LSE and 512 values of the output, NaN for those of whole requests.
  template <typename Element>
  void print() const {
    const auto* columns = static_cast<const Element*>(a.out);
    for (size_t row = 0; row < rows_; ++row) {
      std::printf("%.17g", static_cast<double>(lse_[row]));
      for (int i = 0; i < flashmla::kLatent; ++i) std::printf(" %.17g", value_of(*columns++));
      std::printf("\n");
    }
  }

 private:
  static constexpr size_t kRowBytes = flashmla::kLatent * sizeof(__half);

  // Of a number for each request, where each begins if they lie one after the other, and the end.
  static std::vector<int32_t> read_sums(int batch) {
    std::vector<int32_t> sums(batch + 1);
    for (int i = 0; i < batch; ++i) {
      if (std::scanf("%d", &sums[i + 1]) != 1) std::exit(1);
      sums[i + 1] += sums[i];
    }
    return sums;
  }

  std::vector<int32_t> offsets_, query_offsets_;
  size_t rows_;  // of the output
  Memory partials_, out_;
  std::vector<float> lse_;
};

}  // namespace emulation
