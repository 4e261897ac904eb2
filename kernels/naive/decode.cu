// Launches the textbook kernel.
#include <cuda_runtime_api.h>

#include <climits>

#include "flashmla/naive.h"
#include "host/error.h"
#include "naive/decode.cuh"

flashmla_status flashmla_naive_decode(const flashmla_decode_params* params) {
  using namespace flashmla;
  const flashmla_decode_params& p = *params;
  const int64_t rows = int64_t{p.batch} * p.s_q * p.h_q;
  if (rows == 0) return FLASHMLA_OK;
  if (p.query_offsets != nullptr) {
    return fail(FLASHMLA_INVALID_ARGUMENT,
                "query_offsets was given; accepted: null, since the naive kernel takes s_q query "
                "tokens of every request");
  }
  if (rows > INT_MAX) {
    return fail(FLASHMLA_INVALID_ARGUMENT,
                "batch * s_q * h_q: %lld rows, but one launch takes up to %d",
                static_cast<long long>(rows), INT_MAX);
  }
  auto* kernel = p.dtype == FLASHMLA_BF16 ? &naive::naive_decode_kernel<__nv_bfloat162>
                                          : &naive::naive_decode_kernel<__half2>;
  kernel<<<static_cast<unsigned>(rows), naive::kThreads, 0, static_cast<cudaStream_t>(p.stream)>>>(
      p);
  if (const cudaError_t error = cudaGetLastError())
    return fail(FLASHMLA_CUDA_ERROR, "naive decode launch: %s", cudaGetErrorString(error));
  return FLASHMLA_OK;
}
