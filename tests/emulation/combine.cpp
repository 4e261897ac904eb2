// What the combine kernel makes of the pieces of requests in free mode, on the CPU, case after case
// from stdin:
//   thread blocks, kernel, rows, batch, descending, bf16, heads of a ragged step, else 0, then what
//   CombineCase reads, then of every piece and row its LSE, two scales and 512 values
// and prints what CombineCase prints. Kernels: words of a lane, or 8: four of them, two thread
// blocks an SM.
#include "combine_case.h"
// after the emulated CUDA names
#include "sm90/combine.cuh"

using namespace flashmla;

namespace {

template <typename Element, bool kRagged>
void combine_rows(const DecodeArguments& a, int kernel) {
  if (kernel == 1) combine_kernel<Element, kRagged, 1, 1>(a);
  if (kernel == 2) combine_kernel<Element, kRagged, 2, 1>(a);
  if (kernel == 4) combine_kernel<Element, kRagged, 4, 1>(a);
  if (kernel == 8) combine_kernel<Element, kRagged, 4, 2>(a);
}

template <typename Element>
void combine(const DecodeArguments& a, int kernel) {
  a.query_offsets == nullptr ? combine_rows<Element, false>(a, kernel)
                             : combine_rows<Element, true>(a, kernel);
}

}  // namespace

int main() {
  emulation::Block block(kCombineThreads);
  emulation::Block::active() = &block;
  int blocks, kernel, rows, batch, descending, bf16, heads;
  while (std::scanf("%d %d %d %d %d %d %d", &blocks, &kernel, &rows, &batch, &descending, &bf16,
                    &heads) == 7) {
    emulation::CombineCase batch_case(batch, rows);
    if (heads > 0) batch_case.read_queries(heads);
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
    batch_case.run(block, blocks, descending,
                   [&] { bf16 ? combine<__nv_bfloat16>(a, kernel) : combine<__half>(a, kernel); });
    bf16 ? batch_case.print<__nv_bfloat16>() : batch_case.print<__half>();
  }
}
