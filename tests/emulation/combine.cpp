// What the combine kernel makes of the pieces of requests in free mode, on the CPU, case after case
// from stdin:
//   thread blocks, those of an SM, rows, batch, descending, bf16, then how many pieces each request
//   was cut into (0: not), then of every piece and row its LSE, two scales and 512 values
// and prints of every row its LSE and 512 values of the output, NaN for those of whole requests.
// Values are fp16, in the order in which an accumulator's threads hold them.
#include <cstdio>

#include "cuda_threads.h"
#include "kernels.h"
// after the emulated CUDA names
#include "sm90/combine.cuh"

using namespace flashmla;

namespace {

template <typename Element>
void print_row(const DecodeArguments& a, size_t row) {
  std::printf("%.17g", static_cast<double>(a.lse[row]));
  const Element* columns = static_cast<const Element*>(a.out) + row * kLatent;
  for (int i = 0; i < kLatent; ++i) std::printf(" %.17g", emulation::value_of(columns[i]));
  std::printf("\n");
}

template <typename Element>
void combine(const DecodeArguments& a, int blocks_per_sm) {
  blocks_per_sm == 1 ? combine_kernel<Element, false, 1>(a) : combine_kernel<Element, false, 2>(a);
}

}  // namespace

int main() {
  emulation::Block block(kCombineThreads);
  emulation::Block::active() = &block;
  int blocks, blocks_per_sm, rows, batch, descending, bf16;
  while (std::scanf("%d %d %d %d %d %d", &blocks, &blocks_per_sm, &rows, &batch, &descending,
                    &bf16) == 6) {
    std::vector<int32_t> offsets(batch + 1);
    for (int i = 0; i < batch; ++i) {
      if (std::scanf("%d", &offsets[i + 1]) != 1) return 1;
      offsets[i + 1] += offsets[i];
    }
    const size_t partial_rows = size_t{1} * offsets[batch] * rows;
    std::vector<PartialState> states(partial_rows);
    const emulation::Memory partials(partial_rows * kLatent * sizeof(__half));
    auto* const values = reinterpret_cast<__half*>(partials.bytes);
    for (size_t i = 0; i < partial_rows; ++i) {
      float scale[2];
      if (std::scanf("%f %f %f", &states[i].lse, &scale[0], &scale[1]) != 3) return 1;
      for (int half = 0; half < 2; ++half)
        states[i].scale[half] = static_cast<uint16_t>(__float_as_uint(scale[half]) >> 16);
      for (int j = 0; j < kLatent; ++j) {
        float value;
        if (std::scanf("%f", &value) != 1) return 1;
        values[i * kLatent + j] = {to_half(value)};
      }
    }
    const size_t out_rows = size_t{1} * batch * rows;
    const emulation::Memory out(out_rows * kLatent * sizeof(__half));
    std::vector<float> lse(out_rows, std::nanf(""));
    DecodeArguments a{};
    a.batch = batch;
    a.split_offsets = offsets.data();
    a.partial_out = values;
    a.partial_lse = states.data();
    a.out = out.bytes;
    a.lse = lse.data();
    a.s_q = a.h_kv = 1;
    a.h_q = a.rows = rows;
    a.group = a.head_rows = a.all_rows = Divisor(rows);
    gridDim = {blocks, 1, 1};
    for (blockIdx = {0, 0, 0}; blockIdx.x < blocks; ++blockIdx.x) {
      block.run(
          [&] {
            bf16 ? combine<__nv_bfloat16>(a, blocks_per_sm) : combine<__half>(a, blocks_per_sm);
          },
          descending ? emulation::Order::kDescending : emulation::Order::kAscending);
    }
    for (size_t row = 0; row < out_rows; ++row)
      bf16 ? print_row<__nv_bfloat16>(a, row) : print_row<__half>(a, row);
  }
}
