// What the decode and combine kernels make of the results of a request's leaves, on the CPU, case
// after case from stdin:
//   pages rows max_leaves seed descending fp16
// Leaves' accumulators are drawn at random, some rows of some leaves see no token. Merged by one
// thread block, and as every power of two of pieces, then, for bf16, with O times 2^40 and 2^-40.
// Prints a line per case: leaves, how many cuts and scales gave other bits, and the largest errors
// of O and of the LSE against fp64; that of O in units of half the output's last place of the sum
// of weighted magnitudes: 2^-8 of it, or 2^-11.
#include <cstdio>
#include <random>

#include "cuda_threads.h"
#include "kernels.h"
// after the emulated CUDA names
#include "sm90/combine_leaves.cuh"
#include "sm90/span.cuh"

using namespace flashmla;

namespace {

constexpr int kHalf = kLatent / 2;

struct Leaf {
  float anchor[kTileRows], sum[kTileRows];
  float o[kTileRows][kLatent];
};

struct Result {
  std::vector<uint16_t> out;
  std::vector<float> lse;
  bool operator==(const Result& other) const {
    return out == other.out &&
           std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0;
  }
};

template <typename Element>
double value_of(uint16_t bits) {
  return emulation::value_of(same_bits<Element>(bits));
}

template <typename Element>
constexpr int kUnits = std::is_same_v<Element, __half> ? 2048 : 256;

std::vector<Leaf> draw(int count, uint32_t seed) {
  std::mt19937 source(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  std::vector<Leaf> leaves(count);
  const float spread = std::vector<float>{0.5f, 8.0f, 40.0f}[seed % 3];
  const bool uneven = seed % 4 == 3;  // V of leaves without like, or nothing but zeros
  for (Leaf& leaf : leaves) {
    const float magnitude =
        uneven ? std::vector<float>{0.0f, 0x1p-60f, 1.0f, 0x1p60f}[source() % 4] : 1.0f;
    for (int row = 0; row < kTileRows; ++row) {
      const bool blind = uniform(source) < 0.1f;
      leaf.anchor[row] = blind ? 0.0f : 30.0f + spread * normal(source);
      leaf.sum[row] = blind ? 0.0f : 0.5f + 300.0f * uniform(source);
      for (float& x : leaf.o[row])
        x = blind ? std::nanf("") : magnitude * leaf.sum[row] * normal(source);
      if (!blind) leaf.o[row][7] = magnitude * 4 * leaf.sum[row];  // siblings of one sign
    }
  }
  return leaves;
}

template <typename Element, int kThreadRows>
class Machine {
 public:
  Machine(int pages, int rows, int max_leaves, const std::vector<Leaf>& leaves, bool descending)
      : pages_(pages),
        leaves_(leaves),
        order_(descending ? emulation::Order::kDescending : emulation::Order::kAscending) {
    a_.batch = a_.s_q = a_.h_kv = 1;
    a_.h_q = a_.rows = rows;
    a_.group = a_.head_rows = a_.all_rows = Divisor(rows);
    a_.max_leaves = max_leaves;
  }

  Result run(int pieces, float scale) {
    const size_t rows = a_.rows;
    Result result{std::vector<uint16_t>(rows * kLatent), std::vector<float>(rows)};
    const std::vector<int32_t> offsets{0, pieces == 1 ? 0 : pieces};
    const size_t levels = 31 - __clz(a_.max_leaves);
    const size_t sixteens = std::clamp<size_t>((rows + 15) / 16, 2, 4);
    emulation::Memory rooms(pieces * levels * sixteens * 4 * FLASHMLA_ROOM_FLOATS_OF_16_ROWS),
        values(pieces * rows * kLatent * 2);
    std::vector<NodeState> states(2 * pieces * rows);
    a_.split_offsets = offsets.data();
    a_.rooms = rooms.bytes;
    a_.partial_out = reinterpret_cast<__half*>(values.bytes);
    a_.partial_lse = reinterpret_cast<PartialState*>(states.data());
    emulation::Memory out(rows * kLatent * 2);  // aligned
    a_.out = out.bytes;
    a_.lse = result.lse.data();
    gridDim = {1, 1, pieces};
    for (int piece = 0; piece < pieces; ++piece) {
      blockIdx = {0, 0, piece};
      const Item item(int4{0, pages_ * piece / pieces, pages_ * (piece + 1) / pieces,
                           pieces == 1 ? -1 : piece});
      for (int half = 0; half < 2; ++half) run_on(warpgroup_, [&] { decode(item, half, scale); });
    }
    gridDim = {3, 1, 1};
    for (blockIdx = {0, 0, 0}; blockIdx.x < gridDim.x; ++blockIdx.x)
      run_on(combiners_, [&] { combine_leaves_kernel<Element, 1, 1>(a_); });
    std::memcpy(result.out.data(), out.bytes, rows * kLatent * 2);
    return result;
  }

 private:
  void run_on(emulation::Block& block, const std::function<void()>& body) {
    emulation::Block::active() = &block;
    block.run(body, order_);
  }

  // One warpgroup's part of a work item.
  void decode(const Item& item, int half, float scale) const {
    const int length = pages_ * kTileTokens, quad = threadIdx.x % 4;
    Span<true> span(a_, item, length);
    float o[128];
    for (;;) {
      const Leaf& leaf = leaves_[span.cursor.number];
      RowState states[kThreadRows];
      for (int r = 0; r < kThreadRows; ++r) {
        const int row = accumulator_row<kThreadRows>(r);
        states[r] = {leaf.anchor[row], leaf.sum[row]};
        for (int n = 0; n < 32; ++n) {
          for (int i = 0; i < 2; ++i)
            o[4 * n + 2 * r + i] = scale * leaf.o[row][half * kHalf + 8 * n + 2 * quad + i];
        }
      }
      if (span.end == item.page_end) {
        end_item<Element>(a_, item, 0, 0, half, states, span, o);
        return;
      }
      end_leaf(a_, item, length, 0, half, states, span, o);
    }
  }

  int pages_;
  const std::vector<Leaf>& leaves_;
  emulation::Order order_;
  DecodeArguments a_{};
  emulation::Block warpgroup_{128}, combiners_{kCombineThreads};
};

// The largest errors of O and of the LSE.
template <typename Element>
std::pair<double, double> errors(const Result& result, const std::vector<Leaf>& leaves, int rows) {
  double worst = 0.0, worst_lse = 0.0;
  for (int row = 0; row < rows; ++row) {
    double most = -INFINITY, sum = 0.0;
    std::vector<double> o(kLatent), magnitude(kLatent);
    for (const Leaf& leaf : leaves) {
      if (leaf.sum[row] > 0) most = std::max<double>(most, leaf.anchor[row]);
    }
    for (const Leaf& leaf : leaves) {
      if (leaf.sum[row] == 0) continue;
      const double weight = std::exp2(leaf.anchor[row] - most);
      sum += weight * leaf.sum[row];
      for (int i = 0; i < kLatent; ++i) {
        o[i] += weight * leaf.o[row][i];
        magnitude[i] += weight * std::fabs(leaf.o[row][i]);
      }
    }
    for (int i = 0; i < kLatent; ++i) {
      const double value = value_of<Element>(result.out[row * kLatent + i]);
      if (sum == 0) {
        worst = std::max(worst, value == 0.0 ? 0.0 : INFINITY);
        continue;
      }
      const double error = std::fabs(value - o[i] / sum) / (magnitude[i] / sum) * kUnits<Element>;
      worst = std::isfinite(error) ? std::max(worst, error) : INFINITY;
    }
    const double lse = result.lse[row], expected = (most + std::log2(sum)) * std::log(2.0);
    const bool equal = sum == 0 ? lse == -INFINITY : std::isfinite(lse);
    worst_lse = std::max(worst_lse, !equal ? INFINITY : sum == 0 ? 0.0 : std::fabs(lse - expected));
  }
  return {worst, worst_lse};
}

bool is_scaled(const Result& result, const Result& plain, float scale) {
  for (size_t i = 0; i < plain.out.size(); ++i) {
    if (value_of<__nv_bfloat16>(result.out[i]) != scale * value_of<__nv_bfloat16>(plain.out[i]))
      return false;
  }
  return result.lse == plain.lse;
}

template <typename Element, int kThreadRows>
void run(int pages, int rows, int max_leaves, int seed, bool descending) {
  const int count = leaf_count(pages, max_leaves);
  const std::vector<Leaf> leaves = draw(count, seed);
  Machine<Element, kThreadRows> machine(pages, rows, max_leaves, leaves, descending);
  const Result whole = machine.run(1, 1.0f);
  int other_bits = 0;
  for (int pieces = 2; pieces <= count; pieces *= 2)
    other_bits += !(machine.run(pieces, 1.0f) == whole);
  int other_scales = 0;
  if (std::is_same_v<Element, __nv_bfloat16>) {
    for (const float scale : {0x1p40f, 0x1p-40f}) {
      for (int pieces = 1; pieces <= std::min(count, 2); ++pieces)
        other_scales += !is_scaled(machine.run(pieces, scale), whole, scale);
    }
  }
  const auto [error, lse_error] = errors<Element>(whole, leaves, rows);
  std::printf("%d %d %d %g %g\n", count, other_bits, other_scales, error, lse_error);
}

template <int kThreadRows>
auto runner(bool fp16) {
  return fp16 ? run<__half, kThreadRows> : run<__nv_bfloat16, kThreadRows>;
}

}  // namespace

int main() {
  int pages, rows, max_leaves, seed, descending, fp16;
  while (std::scanf("%d %d %d %d %d %d", &pages, &rows, &max_leaves, &seed, &descending, &fp16) ==
         6) {
    const auto run_as = rows <= kDealtRows ? runner<1>(fp16) : runner<2>(fp16);
    run_as(pages, rows, max_leaves, seed, descending);
  }
}
