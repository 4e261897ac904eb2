// The scheduler kernel: one cluster, one candidate per thread block.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "host/device.h"
#include "host/error.h"
#include "host/validate.h"
#include "sm90/launch.cuh"
#include "sm90/ptx/cluster.cuh"
#include "sm90/ptx/sync.cuh"
#include "sm90/schedule.cuh"

namespace flashmla::schedule {
namespace {

constexpr size_t kMostBytes = Workspace::bytes(
    FLASHMLA_SCHEDULE_MAX_BATCH,
    std::max<int>(FLASHMLA_SCHEDULE_MAX_BATCH, FLASHMLA_SCHEDULE_MAX_ROUNDS* kMaxParts));
static_assert(kMostBytes <= 232448, "shared memory of an SM");
static_assert(kCandidates == 8, "the largest cluster that every Hopper GPU takes");

__global__ void __cluster_dims__(kCandidates, 1, 1) __launch_bounds__(kThreads, 1)
    schedule_kernel(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(16) uint8_t raw_shared[];
  const Workspace workspace(raw_shared, a.batch, a.max_items);
  const int rank = ptx::cluster_rank();
  ptx::cluster_arrive();  // this block has started: peers may write to it
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();

  Scheduler scheduler(a, workspace);
  const int64_t total = scheduler.propose(rank);
  ptx::cluster_wait();
  if (threadIdx.x < kCandidates)
    ptx::store_to_peer(&workspace.fixed->totals[rank], static_cast<int>(threadIdx.x), total);
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (cheapest(workspace.fixed->totals) == rank) scheduler.publish();
}

}  // namespace
}  // namespace flashmla::schedule

flashmla_status flashmla_schedule(const flashmla_schedule_params* params) {
  using namespace flashmla;
  using namespace flashmla::schedule;
  const flashmla_schedule_params& p = *params;
  if (const flashmla_status status = validate(p)) return status;
  int device = 0;
  if (const flashmla_status status = require_hopper(&device)) return status;

  Arguments arguments{};
  arguments.seq_lens = p.seq_lens;
  arguments.batch = p.batch;
  arguments.parts = p.num_parts;
  arguments.max_items = std::max(p.batch, FLASHMLA_SCHEDULE_MAX_ROUNDS * p.num_parts);
  arguments.max_leaves = p.max_leaves;
  arguments.cost = p.cost;
  arguments.items = reinterpret_cast<int4*>(p.items);
  arguments.part_offsets = p.part_offsets;
  arguments.split_offsets = p.split_offsets;

  static std::atomic<uint64_t> allowed{0};
  if (const flashmla_status status = allow_shared_memory(
          reinterpret_cast<const void*>(schedule_kernel), kMostBytes, device, &allowed))
    return status;
  if (const cudaError_t error =
          launch_dependent(schedule_kernel, dim3(kCandidates), kThreads,
                           Workspace::bytes(p.batch, arguments.max_items), p.stream, arguments))
    return fail(FLASHMLA_CUDA_ERROR, "schedule launch: %s", cudaGetErrorString(error));
  return FLASHMLA_OK;
}
