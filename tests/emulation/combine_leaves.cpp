// Runs the combine kernel of batch-invariant mode on the CPU, case after case from stdin:
//   blocks rows batch order kernel, then what CombineCase reads, then of every piece, row and half
//   its sum and exponent, and 256 values
// and prints what CombineCase prints. Kernels: 0 fp16, 1 bf16, 2 bf16 with two thread blocks an SM.
#include "combine_case.h"
// after the emulated CUDA names
#include "sm90/combine_leaves.cuh"

using namespace flashmla;

int main() {
  emulation::Block block(kCombineThreads);
  emulation::Block::active() = &block;
  int blocks, rows, batch, descending, kernel;
  while (std::scanf("%d %d %d %d %d", &blocks, &rows, &batch, &descending, &kernel) == 5) {
    emulation::CombineCase batch_case(batch, rows);
    std::vector<NodeState> states(kRowHalves * batch_case.partial_rows());
    for (size_t i = 0; i < states.size(); ++i) {
      if (std::scanf("%f %d", &states[i].sum, &states[i].exponent) != 2) return 1;
      batch_case.read_values(i * 256, 256);
    }
    DecodeArguments& a = batch_case.a;
    a.partial_lse = reinterpret_cast<PartialState*>(states.data());
    batch_case.run(block, blocks, descending, [&] {
      if (kernel == 0) combine_leaves_kernel<__half, 1>(a);
      if (kernel == 1) combine_leaves_kernel<__nv_bfloat16, 1>(a);
      if (kernel == 2) combine_leaves_kernel<__nv_bfloat16, 2>(a);
    });
    kernel == 0 ? batch_case.print<__half>() : batch_case.print<__nv_bfloat16>();
  }
}
