// What the combine kernel makes of the pieces of requests in free mode, on the CPU, case after case
// from stdin:
//   thread blocks, those of an SM, rows, batch, descending, bf16, then what CombineCase reads, then
//   of every piece and row its LSE, two scales and 512 values
// and prints what CombineCase prints.
#include "combine_case.h"
// after the emulated CUDA names
#include "sm90/combine.cuh"

using namespace flashmla;

namespace {

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
    emulation::CombineCase batch_case(batch, rows);
    std::vector<PartialState> states(batch_case.partial_rows());
    for (size_t i = 0; i < states.size(); ++i) {
      float scale[2];
      if (std::scanf("%f %f %f", &states[i].lse, &scale[0], &scale[1]) != 3) return 1;
      for (int half = 0; half < 2; ++half)
        states[i].scale[half] = static_cast<uint16_t>(__float_as_uint(scale[half]) >> 16);
      batch_case.read_values(i * kLatent, kLatent);
    }
    DecodeArguments& a = batch_case.a;
    a.partial_lse = states.data();
    batch_case.run(block, blocks, descending, [&] {
      bf16 ? combine<__nv_bfloat16>(a, blocks_per_sm) : combine<__half>(a, blocks_per_sm);
    });
    bf16 ? batch_case.print<__nv_bfloat16>() : batch_case.print<__half>();
  }
}
