// How every kernel of a decode step is launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace flashmla {

// It may start before the kernel before it on the stream has ended, for which it waits itself.
// `cluster_size` neighbours of the grid's x dimension are a cluster.
template <typename Arguments>
cudaError_t launch_dependent(void (*kernel)(Arguments), dim3 grid, int threads, size_t shared_bytes,
                             void* stream, const Arguments& arguments, int cluster_size = 1) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster_size);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = cluster_size > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

}  // namespace flashmla
