// One small decode on the GPU with a schedule made by hand and no Python in sight, against double
// precision on the host; then the same by the textbook kernel. Exit code: 0 both are right, 1 one
// is not, 2 no device.
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "flashmla/decode.h"
#include "flashmla/device.h"
#include "flashmla/naive.h"

namespace {

constexpr int kBatch = 3, kQueries = 2, kHeads = 20, kWidth = 576, kLatent = 512, kPageTokens = 64;
constexpr int kRows = kQueries * kHeads, kPages = 20, kTableWidth = 12;
constexpr float kScale = 0.07f;
constexpr int32_t kPoisonPage = 2147480000;  // an entry past the length; following it would fault

const std::vector<int32_t> kLengths = {200, 700, 0};

// Request 0 is one item, request 1 is cut after 6 of its 11 pages, request 2 is empty.
const std::vector<int32_t> kItems = {
    0, 0, 4,  -1,  //
    1, 0, 6,  0,   //
    2, 0, 0,  -1,  //
    1, 6, 11, 1,
};
const std::vector<int32_t> kPartOffsets = {0, 1, 3, 4};
const std::vector<int32_t> kSplitOffsets = {0, 0, 2, 2};

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("FAIL %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// A vector's copy on the device, kept until the program ends.
template <typename T>
T* to_device(const std::vector<T>& host) {
  T* device = nullptr;
  check(cudaMalloc(&device, host.size() * sizeof(T)), "cudaMalloc");
  check(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice),
        "cudaMemcpy to the device");
  return device;
}

template <typename T>
std::vector<T> to_host(const T* device, size_t count) {
  std::vector<T> host(count);
  check(cudaMemcpy(host.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost),
        "cudaMemcpy to the host");
  return host;
}

struct Problem {
  std::vector<__nv_bfloat16> q;   // [B, S_q, H_q, 576]
  std::vector<__nv_bfloat16> kv;  // [P, 64, 576], NaN wherever no request has written
  std::vector<int32_t> table;     // [B, W]

  const __nv_bfloat16* token(int request, int index) const {
    const int64_t page = table[request * kTableWidth + index / kPageTokens];
    return &kv[(page * kPageTokens + index % kPageTokens) * kWidth];
  }
};

Problem make_problem() {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  Problem problem;
  problem.q.resize(kBatch * kRows * kWidth);
  for (auto& x : problem.q) x = __float2bfloat16(normal(random));

  problem.kv.assign(kPages * kPageTokens * kWidth,
                    __float2bfloat16(std::numeric_limits<float>::quiet_NaN()));
  problem.table.assign(kBatch * kTableWidth, kPoisonPage);
  std::vector<int32_t> pages(kPages);
  for (int i = 0; i < kPages; ++i) pages[i] = i;
  std::shuffle(pages.begin(), pages.end(), random);
  int taken = 0;
  for (int request = 0; request < kBatch; ++request) {
    for (int index = 0; index < kLengths[request]; ++index) {
      int32_t& entry = problem.table[request * kTableWidth + index / kPageTokens];
      if (index % kPageTokens == 0) entry = pages[taken++];
      auto* row = const_cast<__nv_bfloat16*>(problem.token(request, index));
      for (int column = 0; column < kWidth; ++column)
        row[column] = __float2bfloat16(normal(random) / 10);
    }
  }
  return problem;
}

struct Answer {
  std::vector<double> out;  // [B, S_q, H_q, 512]
  std::vector<double> lse;  // [B, S_q, H_q]
};

Answer host_decode(const Problem& problem) {
  Answer answer{std::vector<double>(kBatch * kRows * kLatent),
                std::vector<double>(kBatch * kRows, -std::numeric_limits<double>::infinity())};
  for (int row = 0; row < kBatch * kRows; ++row) {
    const int request = row / kRows, query = row % kRows / kHeads;
    const int visible = kLengths[request] - kQueries + query + 1;
    if (visible <= 0) continue;
    std::vector<double> weights(visible);
    for (int t = 0; t < visible; ++t) {
      const __nv_bfloat16* k = problem.token(request, t);
      double dot = 0;
      for (int column = 0; column < kWidth; ++column) {
        dot += double{__bfloat162float(problem.q[row * kWidth + column])} *
               __bfloat162float(k[column]);
      }
      weights[t] = dot * kScale;
    }
    const double maximum = *std::max_element(weights.begin(), weights.end());
    double sum = 0;
    for (double& weight : weights) sum += weight = std::exp(weight - maximum);
    answer.lse[row] = maximum + std::log(sum);
    for (int t = 0; t < visible; ++t) {
      const __nv_bfloat16* v = problem.token(request, t);
      for (int column = 0; column < kLatent; ++column)
        answer.out[row * kLatent + column] += weights[t] / sum * __bfloat162float(v[column]);
    }
  }
  return answer;
}

// Within an absolute or a relative bound; equal infinities are right, NaN never is.
bool near(double x, double expected, double absolute, double relative) {
  if (x == expected) return true;
  const double error = std::fabs(x - expected);
  return error <= absolute || error <= relative * std::fabs(expected);
}

bool compare(const char* name, const flashmla_decode_params& params, const Answer& expected) {
  const auto out = to_host(static_cast<const __nv_bfloat16*>(params.out), expected.out.size());
  const auto lse = to_host(params.lse, expected.lse.size());
  int wrong = 0;
  double worst = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    const double x = __bfloat162float(out[i]);
    wrong += !near(x, expected.out[i], 8e-4, 2.01 / 128);
    worst = std::max(worst, std::fabs(x - expected.out[i]));
  }
  for (size_t i = 0; i < lse.size(); ++i)
    wrong += !near(lse[i], expected.lse[i], 1e-6, 8.01 / 65536);
  std::printf("%s %s: %d of %zu values out of bounds, largest error of out %.2e\n",
              wrong ? "FAIL" : "OK", name, wrong, out.size() + lse.size(), worst);
  return wrong == 0;
}

bool run(const char* name, flashmla_status (*decode)(const flashmla_decode_params*),
         const flashmla_decode_params& params, const Answer& expected) {
  // All ones is NaN in either type: what a kernel fails to write is found.
  check(cudaMemset(params.out, 0xff, expected.out.size() * sizeof(__nv_bfloat16)), "cudaMemset");
  check(cudaMemset(params.lse, 0xff, expected.lse.size() * sizeof(float)), "cudaMemset");
  if (decode(&params) != FLASHMLA_OK) {
    std::printf("FAIL %s: %s\n", name, flashmla_last_error());
    return false;
  }
  check(cudaDeviceSynchronize(), name);
  return compare(name, params, expected);
}

}  // namespace

int main() {
  int devices = 0;
  if (flashmla_device_count(&devices) != FLASHMLA_OK) {
    std::printf("FAIL %s\n", flashmla_last_error());
    return 1;
  }
  if (devices == 0) {
    std::printf("no CUDA device\n");
    return 2;
  }

  const Problem problem = make_problem();
  const Answer expected = host_decode(problem);
  const int splits = kSplitOffsets.back();

  flashmla_decode_params params{};
  params.dtype = FLASHMLA_BF16;
  params.batch = kBatch;
  params.s_q = kQueries;
  params.h_q = kHeads;
  params.h_kv = 1;
  params.page_size = kPageTokens;
  params.num_pages = kPages;
  params.num_parts = static_cast<int>(kPartOffsets.size()) - 1;
  params.causal = 1;
  params.softmax_scale = kScale;
  params.q = to_device(problem.q);
  params.q_batch_stride = kRows * kWidth;
  params.q_token_stride = kHeads * kWidth;
  params.q_head_stride = kWidth;
  params.kv = to_device(problem.kv);
  params.kv_page_stride = kPageTokens * kWidth;
  params.kv_row_stride = kWidth;
  params.kv_head_stride = kWidth;
  params.seq_lens = to_device(kLengths);
  params.block_table = to_device(problem.table);
  params.block_table_stride = kTableWidth;
  params.items = to_device(kItems);
  params.part_offsets = to_device(kPartOffsets);
  params.split_offsets = to_device(kSplitOffsets);
  params.out = to_device(std::vector<__nv_bfloat16>(expected.out.size()));
  params.lse = to_device(std::vector<float>(expected.lse.size()));
  params.partial_out = to_device(std::vector<float>(splits * kRows * kLatent));
  params.partial_lse = to_device(std::vector<float>(splits * kRows));

  const bool decode_right = run("decode", &flashmla_decode, params, expected);
  const bool naive_right = run("naive decode", &flashmla_naive_decode, params, expected);
  return decode_right && naive_right ? 0 : 1;
}
