// A .cu file because nvcc knows where the CUDA runtime's headers lie, whatever the toolkit's
// layout.
#include <cuda_runtime_api.h>

#include <cstdio>

#include "flashmla/device.h"
#include "host/error.h"

using flashmla::fail;

flashmla_status flashmla_device_count(int* count) {
  *count = 0;
  const cudaError_t error = cudaGetDeviceCount(count);
  if (error == cudaSuccess) return FLASHMLA_OK;

  *count = 0;
  cudaGetLastError();  // the failure is handled here; leave no sticky error to the process
  if (error == cudaErrorNoDevice || error == cudaErrorStubLibrary) return FLASHMLA_OK;
  if (error == cudaErrorInsufficientDriver) {
    // The runtime reports a missing driver and an old one alike; only the missing one has version
    // 0.
    int driver = 0;
    cudaDriverGetVersion(&driver);
    if (driver == 0) return FLASHMLA_OK;
    return fail(
        FLASHMLA_DRIVER_TOO_OLD,
        "the NVIDIA driver serves CUDA up to %d.%d, this build needs CUDA %d.x: update the driver",
        driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000);
  }
  return fail(FLASHMLA_CUDA_ERROR, "cudaGetDeviceCount: %s", cudaGetErrorString(error));
}

flashmla_status flashmla_device_query(int index, flashmla_device* device) {
  int count = 0;
  if (const flashmla_status status = flashmla_device_count(&count)) return status;
  if (index < 0 || index >= count) {
    return fail(FLASHMLA_INVALID_ARGUMENT,
                "index: %d, but this machine has %d visible CUDA device(s)", index, count);
  }
  cudaDeviceProp properties{};
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, index)) {
    return fail(FLASHMLA_CUDA_ERROR, "cudaGetDeviceProperties(%d): %s", index,
                cudaGetErrorString(error));
  }
  *device = {};
  std::snprintf(device->name, sizeof(device->name), "%s", properties.name);
  device->compute_major = properties.major;
  device->compute_minor = properties.minor;
  device->sm_count = properties.multiProcessorCount;
  device->memory_bytes = properties.totalGlobalMem;
  device->l2_bytes = static_cast<uint64_t>(properties.l2CacheSize);
  cudaDriverGetVersion(&device->driver_cuda_version);
  return FLASHMLA_OK;
}
