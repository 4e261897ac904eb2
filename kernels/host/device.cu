// A .cu file because nvcc knows where the CUDA runtime's headers lie, whatever the toolkit's
// layout.
#include <cuda_runtime_api.h>

#include <cstdio>

#include "flashmla/device.h"
#include "host/device.h"
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

namespace flashmla {
namespace {

constexpr int kRememberedDevices = 64;  // bits of a mask; a device beyond them is asked every time

bool remembers(const std::atomic<uint64_t>& mask, int device) {
  return device < kRememberedDevices && mask.load(std::memory_order_relaxed) >> device & 1;
}

void remember(std::atomic<uint64_t>* mask, int device) {
  if (device < kRememberedDevices) mask->fetch_or(uint64_t{1} << device, std::memory_order_relaxed);
}

}  // namespace

flashmla_status require_hopper(int* device) {
  static std::atomic<uint64_t> hoppers{0};
  if (cudaGetDevice(device) == cudaSuccess && remembers(hoppers, *device)) return FLASHMLA_OK;
  int count = 0;
  if (const flashmla_status status = flashmla_device_count(&count)) return status;
  if (count == 0)
    return fail(FLASHMLA_UNSUPPORTED_DEVICE, "there is no CUDA device; the kernels run on Hopper");
  cudaError_t error = cudaGetDevice(device);
  int major = 0, minor = 0;
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, *device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, *device);
  if (error != cudaSuccess)
    return fail(FLASHMLA_CUDA_ERROR, "current device: %s", cudaGetErrorString(error));
  if (major != 9 || minor != 0) {
    return fail(FLASHMLA_UNSUPPORTED_DEVICE,
                "device %d has compute capability %d.%d; the kernels of this build run on 9.0 "
                "(Hopper)",
                *device, major, minor);
  }
  remember(&hoppers, *device);
  return FLASHMLA_OK;
}

flashmla_status allow_shared_memory(const void* kernel, size_t bytes, int device,
                                    std::atomic<uint64_t>* done) {
  if (remembers(*done, device)) return FLASHMLA_OK;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) {
    return fail(FLASHMLA_CUDA_ERROR, "%zu bytes of shared memory: %s", bytes,
                cudaGetErrorString(error));
  }
  remember(done, device);
  return FLASHMLA_OK;
}

}  // namespace flashmla
