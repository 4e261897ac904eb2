// flashmla_backend._native: the C ABI as a Python module. It knows nothing of torch, so that one
// build serves every torch.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "flashmla/build_info.h"
#include "flashmla/device.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

void check(flashmla_status status) {
  if (status == FLASHMLA_OK) return;
  if (status == FLASHMLA_INVALID_ARGUMENT) throw py::value_error(flashmla_last_error());
  throw std::runtime_error(flashmla_last_error());
}

py::dict build_info() {
  const flashmla_build_info info = flashmla_get_build_info();
  return py::dict("version"_a = info.version, "cuda_version"_a = info.cuda_version,
                  "arch"_a = info.arch, "cutlass_version"_a = info.cutlass_version,
                  "compiler"_a = info.compiler,
                  "has_decode_kernels"_a = info.has_decode_kernels != 0);
}

int device_count() {
  int count = 0;
  check(flashmla_device_count(&count));
  return count;
}

py::dict device(int index) {
  flashmla_device device;
  check(flashmla_device_query(index, &device));
  return py::dict(
      "name"_a = device.name,
      "compute_capability"_a = py::make_tuple(device.compute_major, device.compute_minor),
      "sm_count"_a = device.sm_count, "memory_bytes"_a = device.memory_bytes,
      "l2_bytes"_a = device.l2_bytes, "driver_cuda_version"_a = device.driver_cuda_version);
}

void probe(int index) {
  flashmla_status status;
  {
    py::gil_scoped_release release;  // waits for the device
    status = flashmla_probe(index);
  }
  check(status);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.def("build_info", &build_info);
  module.def("device_count", &device_count);
  module.def("device", &device, "index"_a);
  module.def("probe", &probe, "index"_a);
}
