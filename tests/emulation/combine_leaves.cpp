// Runs the combine kernel of batch-invariant mode on the CPU, case after case from stdin:
//   blocks rows batch order kernel bf16, then what CombineCase reads, then of every piece, row and
//   half its sum and exponent, and 256 values
// and prints what CombineCase prints. Kernels: words of a lane, or 8: four of them, two thread
// blocks an SM, which fp16 has not.
#include "combine_case.h"
// after the emulated CUDA names
#include "sm90/combine_leaves.cuh"

using namespace flashmla;

namespace {

template <typename Element>
void combine(const DecodeArguments& a, int kernel) {
  if (kernel == 1) combine_leaves_kernel<Element, 1, 1>(a);
  if (kernel == 2) combine_leaves_kernel<Element, 2, 1>(a);
  if (kernel == 4) combine_leaves_kernel<Element, 4, 1>(a);
  if (kernel == 8) combine_leaves_kernel<__nv_bfloat16, 4, 2>(a);
}

}  // namespace

int main() {
  emulation::Block block(kCombineThreads);
  emulation::Block::active() = &block;
  int blocks, rows, batch, descending, kernel, bf16;
  while (std::scanf("%d %d %d %d %d %d", &blocks, &rows, &batch, &descending, &kernel, &bf16) ==
         6) {
    emulation::CombineCase batch_case(batch, rows);
    std::vector<NodeState> states(kRowHalves * batch_case.partial_rows());
    for (size_t i = 0; i < states.size(); ++i) {
      if (std::scanf("%f %d", &states[i].sum, &states[i].exponent) != 2) return 1;
      batch_case.read_values(i * 256, 256);
    }
    DecodeArguments& a = batch_case.a;
    a.partial_lse = reinterpret_cast<PartialState*>(states.data());
    batch_case.run(block, blocks, descending,
                   [&] { bf16 ? combine<__nv_bfloat16>(a, kernel) : combine<__half>(a, kernel); });
    bf16 ? batch_case.print<__nv_bfloat16>() : batch_case.print<__half>();
  }
}
