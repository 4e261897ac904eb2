// Proves that this build's code runs on a device: launch, write, read back, compare.
#include <cuda_runtime_api.h>

#include "flashmla/device.h"
#include "host/error.h"

using flashmla::fail;

namespace {

constexpr int kThreads = 128;

__host__ __device__ constexpr unsigned expected(unsigned thread) {
  return thread * 2654435761u + 1u;
}

__global__ void probe_kernel(unsigned* out) { out[threadIdx.x] = expected(threadIdx.x); }

// On the current device.
cudaError_t launch_and_read_back(unsigned (&values)[kThreads]) {
  unsigned* out = nullptr;
  cudaError_t error = cudaMalloc(&out, sizeof(values));
  if (error != cudaSuccess) return error;
  probe_kernel<<<1, kThreads>>>(out);
  error = cudaGetLastError();
  if (error == cudaSuccess) error = cudaMemcpy(values, out, sizeof(values), cudaMemcpyDeviceToHost);
  cudaFree(out);
  return error;
}

}  // namespace

flashmla_status flashmla_probe(int index) {
  flashmla_device device;
  if (const flashmla_status status = flashmla_device_query(index, &device)) return status;
  // sm_90a code runs on compute capability 9.0 only: it is not forward compatible.
  if (device.compute_major != 9 || device.compute_minor != 0) {
    return fail(FLASHMLA_UNSUPPORTED_DEVICE,
                "device %d (%s) has compute capability %d.%d; the kernels of this build run on 9.0 "
                "(Hopper)",
                index, device.name, device.compute_major, device.compute_minor);
  }

  int previous = 0;
  unsigned values[kThreads] = {};
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess) error = cudaSetDevice(index);
  if (error == cudaSuccess) error = launch_and_read_back(values);
  cudaSetDevice(previous);
  if (error != cudaSuccess) {
    return fail(FLASHMLA_CUDA_ERROR, "probe on device %d (%s): %s", index, device.name,
                cudaGetErrorString(error));
  }
  for (unsigned thread = 0; thread < kThreads; ++thread) {
    if (values[thread] != expected(thread)) {
      return fail(FLASHMLA_CUDA_ERROR, "probe on device %d (%s): thread %u wrote %u instead of %u",
                  index, device.name, thread, values[thread], expected(thread));
    }
  }
  return FLASHMLA_OK;
}
