// How every kernel of a decode step is launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace flashmla {

// It may start before the kernel before it on the stream has ended, for which it waits itself.
template <typename Arguments>
cudaError_t launch_dependent(void (*kernel)(Arguments), dim3 grid, int threads, size_t shared_bytes,
                             void* stream, const Arguments& arguments) {
  cudaLaunchAttribute early_start{};
  early_start.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early_start.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early_start;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

}  // namespace flashmla
