// Runs the device scheduler's code on the CPU, case after case from stdin:
//   batch parts max_leaves page item empty_item memory reduction partial order, then `batch`
//   lengths
// and prints a line per case: the items (4 numbers each), the part offsets, the split offsets.
#include "cuda_threads.h"
// after the emulated CUDA names
#include "sm90/schedule.cuh"

namespace {

using namespace flashmla::schedule;

struct Output {
  std::vector<int4> items;
  std::vector<int32_t> part_offsets, split_offsets;
};

Output run(const std::vector<int32_t>& lengths, int parts, int max_leaves,
           const flashmla_cost_model& cost, emulation::Order order, emulation::Block& block) {
  const int batch = static_cast<int>(lengths.size());
  const int most = FLASHMLA_SCHEDULE_MAX_ROUNDS * parts;
  Arguments a{};
  a.seq_lens = lengths.data();
  a.batch = batch;
  a.parts = parts;
  a.max_items = batch > most ? batch : most;
  a.max_leaves = max_leaves;
  a.cost = cost;
  Output output{std::vector<int4>(a.max_items), std::vector<int32_t>(parts + 1),
                std::vector<int32_t>(batch + 1)};
  a.items = output.items.data();
  a.part_offsets = output.part_offsets.data();
  a.split_offsets = output.split_offsets.data();

  // The cluster's blocks one after the other, each with the garbage that shared memory starts with.
  const size_t bytes = Workspace::bytes(batch, a.max_items);
  std::vector<int64_t> raw(bytes / sizeof(int64_t) + 1);
  const auto shared = [&] {
    for (int64_t& word : raw) word = 0x5a5a5a5a5a5a5a5a;
    return Workspace(reinterpret_cast<uint8_t*>(raw.data()), batch, a.max_items);
  };
  int64_t totals[kCandidates];
  for (int rank = 0; rank < kCandidates; ++rank) {
    const Workspace workspace = shared();
    block.run(
        [&] {
          Scheduler scheduler(a, workspace);
          const int64_t total = scheduler.propose(rank);
          if (threadIdx.x == 0) totals[rank] = total;
        },
        order);
  }
  const Workspace workspace = shared();
  block.run(
      [&] {
        Scheduler scheduler(a, workspace);
        scheduler.propose(cheapest(totals));
        scheduler.publish();
      },
      order);
  return output;
}

}  // namespace

int main() {
  emulation::Block block(kThreads);
  emulation::Block::active() = &block;
  int batch, parts, max_leaves, descending;
  flashmla_cost_model cost;
  while (std::scanf("%d %d %d %d %d %d %d %d %d %d", &batch, &parts, &max_leaves, &cost.page,
                    &cost.item, &cost.empty_item, &cost.memory, &cost.reduction, &cost.partial,
                    &descending) == 10) {
    std::vector<int32_t> lengths(batch);
    for (int32_t& length : lengths) {
      if (std::scanf("%d", &length) != 1) return 2;
    }
    const Output output =
        run(lengths, parts, max_leaves, cost,
            descending ? emulation::Order::kDescending : emulation::Order::kAscending, block);
    for (const int4& item : output.items)
      std::printf("%d %d %d %d ", item.x, item.y, item.z, item.w);
    for (int32_t offset : output.part_offsets) std::printf("%d ", offset);
    for (int32_t offset : output.split_offsets) std::printf("%d ", offset);
    std::printf("\n");
    std::fflush(stdout);
  }
}
