// Looks at the lengths and at all table entries in use, once a step.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <climits>

#include "flashmla/bounds.h"
#include "host/device.h"
#include "host/error.h"
#include "host/validate.h"
#include "sm90/bounds.cuh"
#include "sm90/launch.cuh"
#include "sm90/ptx/sync.cuh"

namespace flashmla {
namespace {

constexpr int kCheckThreads = 256;

struct BoundsArguments {
  const int32_t* seq_lens;
  const int32_t* block_table;
  int64_t block_table_stride;
  int32_t* planned_lens;
  flashmla_fault_box* faults;
  int page_size, num_pages;
  int most_tokens;  // that a row of the table holds
};

// One thread block per request.
__global__ void __launch_bounds__(kCheckThreads)
    check_bounds_kernel(const __grid_constant__ BoundsArguments a) {
  __shared__ int first_wrong;  // column of the table
  const int request = blockIdx.x;
  if (threadIdx.x == 0) first_wrong = INT_MAX;
  __syncthreads();
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();

  const int length = __ldg(a.seq_lens + request);
  const bool fits = length >= 0 && length <= a.most_tokens;
  const int pages = fits && length > 0 ? (length - 1) / a.page_size + 1 : 0;
  const int32_t* row = a.block_table + request * a.block_table_stride;
  int wrong = INT_MAX;
#pragma unroll 8  // as many reads on their way
  for (int column = threadIdx.x; column < pages; column += kCheckThreads) {
    const int page = __ldg(row + column);
    if (page < 0 || page >= a.num_pages) wrong = min(wrong, column);
  }
  if (wrong != INT_MAX) atomicMin(&first_wrong, wrong);
  __syncthreads();
  if (threadIdx.x != 0) return;

  wrong = first_wrong;
  const bool in_bounds = fits && wrong == INT_MAX;
  a.planned_lens[request] = in_bounds ? length : -1;
  if (in_bounds) return;
  report_fault(
      a.faults,
      fits ? flashmla_fault{FLASHMLA_FAULT_PAGE, request, wrong, __ldg(row + wrong), a.num_pages}
           : flashmla_fault{FLASHMLA_FAULT_LENGTH, request, 0, length, a.most_tokens});
}

}  // namespace
}  // namespace flashmla

flashmla_status flashmla_check_bounds(const flashmla_bounds_params* params) {
  using namespace flashmla;
  const flashmla_bounds_params& p = *params;
  if (const flashmla_status status = validate(p)) return status;
  int device = 0;
  if (const flashmla_status status = require_hopper(&device)) return status;
  if (p.batch == 0) return FLASHMLA_OK;

  BoundsArguments arguments{};
  arguments.seq_lens = p.seq_lens;
  arguments.block_table = p.block_table;
  arguments.block_table_stride = p.block_table_stride;
  arguments.planned_lens = p.planned_lens;
  arguments.faults = p.faults;
  arguments.page_size = p.page_size;
  arguments.num_pages = p.num_pages;
  arguments.most_tokens =
      static_cast<int>(std::min<int64_t>(INT_MAX, int64_t{p.table_width} * p.page_size));

  if (const cudaError_t error = launch_dependent(check_bounds_kernel, dim3(p.batch), kCheckThreads,
                                                 0, p.stream, arguments))
    return fail(FLASHMLA_CUDA_ERROR, "bounds launch: %s", cudaGetErrorString(error));
  return FLASHMLA_OK;
}
