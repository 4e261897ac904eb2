// Runs the combine kernel of batch-invariant mode on the CPU, case after case from stdin:
//   blocks rows batch order kernel, then how many pieces each request was cut into (0: not), then
//   of every piece, row and half its sum and exponent, and 256 values
// and prints of every row its LSE and 512 values of the output, NaN for those of whole requests.
// Values are fp16, in the order in which an accumulator's threads hold them. Kernels: 0 fp16, 1
// bf16, 2 bf16 with two thread blocks an SM.
#include <cstdio>

#include "cuda_threads.h"
#include "kernels.h"
// after the emulated CUDA names
#include "sm90/combine_leaves.cuh"

using namespace flashmla;

namespace {

template <typename Element>
void print_row(const DecodeArguments& a, size_t row) {
  std::printf("%.17g", static_cast<double>(a.lse[row]));
  const Element* columns = static_cast<const Element*>(a.out) + row * kLatent;
  for (int i = 0; i < kLatent; ++i) std::printf(" %.17g", emulation::value_of(columns[i]));
  std::printf("\n");
}

}  // namespace

int main() {
  emulation::Block block(kCombineThreads);
  emulation::Block::active() = &block;
  int blocks, rows, batch, descending, kernel;
  while (std::scanf("%d %d %d %d %d", &blocks, &rows, &batch, &descending, &kernel) == 5) {
    std::vector<int32_t> offsets(batch + 1);
    for (int i = 0; i < batch; ++i) {
      if (std::scanf("%d", &offsets[i + 1]) != 1) return 1;
      offsets[i + 1] += offsets[i];
    }
    const size_t halves = size_t{2} * offsets[batch] * rows;
    std::vector<NodeState> states(halves);
    const emulation::Memory partials(halves * 256 * sizeof(__half));
    auto* const values = reinterpret_cast<__half*>(partials.bytes);
    for (size_t i = 0; i < halves; ++i) {
      if (std::scanf("%f %d", &states[i].sum, &states[i].exponent) != 2) return 1;
      for (int j = 0; j < 256; ++j) {
        float value;
        if (std::scanf("%f", &value) != 1) return 1;
        values[i * 256 + j] = {to_half(value)};
      }
    }
    const size_t out_rows = size_t{1} * batch * rows;
    const emulation::Memory out(out_rows * kLatent * sizeof(__half));
    std::vector<float> lse(out_rows, std::nanf(""));
    DecodeArguments a{};
    a.split_offsets = offsets.data();
    a.batch = batch;
    a.partial_out = values;
    a.partial_lse = reinterpret_cast<PartialState*>(states.data());
    a.out = out.bytes;
    a.lse = lse.data();
    a.s_q = 1;
    a.h_q = a.rows = rows;
    a.h_kv = 1;
    a.group = a.head_rows = a.all_rows = Divisor(rows);
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
      const auto body = [&] {
        if (kernel == 0) combine_leaves_kernel<__half, 1>(a);
        if (kernel == 1) combine_leaves_kernel<__nv_bfloat16, 1>(a);
        if (kernel == 2) combine_leaves_kernel<__nv_bfloat16, 2>(a);
      };
      block.run(body, descending ? emulation::Order::kDescending : emulation::Order::kAscending);
    }
    for (size_t row = 0; row < out_rows; ++row)
      kernel == 0 ? print_row<__half>(a, row) : print_row<__nv_bfloat16>(a, row);
  }
}
