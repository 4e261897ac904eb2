// flashmla_backend._native: the C ABI as a Python module. It knows nothing of torch, so that one
// build serves every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>

#include "flashmla/bounds.h"
#include "flashmla/build_info.h"
#include "flashmla/decode.h"
#include "flashmla/device.h"
#include "flashmla/naive.h"
#include "flashmla/schedule.h"

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
                  "compiler"_a = info.compiler);
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

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Strides = std::array<int64_t, 3>;

// What every decode kernel is told. Device pointers and the stream are integers.
flashmla_decode_params decode_params(int dtype, std::array<int, 4> shape, int page_size,
                                     int num_pages, bool causal, float softmax_scale,
                                     uintptr_t q_latent, Strides q_latent_strides, uintptr_t q_rope,
                                     Strides q_rope_strides, uintptr_t kv, Strides kv_strides,
                                     uintptr_t seq_lens, uintptr_t block_table,
                                     int64_t block_table_stride, uintptr_t out, uintptr_t lse,
                                     uintptr_t stream) {
  flashmla_decode_params p{};
  p.dtype = dtype;
  p.batch = shape[0];
  p.s_q = shape[1];
  p.h_q = shape[2];
  p.h_kv = shape[3];
  p.page_size = page_size;
  p.num_pages = num_pages;
  p.causal = causal;
  p.softmax_scale = softmax_scale;
  p.q_latent = {pointer<const void>(q_latent), q_latent_strides[0], q_latent_strides[1],
                q_latent_strides[2]};
  p.q_rope = {pointer<const void>(q_rope), q_rope_strides[0], q_rope_strides[1], q_rope_strides[2]};
  p.kv = pointer<const void>(kv);
  p.kv_page_stride = kv_strides[0];
  p.kv_row_stride = kv_strides[1];
  p.kv_head_stride = kv_strides[2];
  p.seq_lens = pointer<const int32_t>(seq_lens);
  p.block_table = pointer<const int32_t>(block_table);
  p.block_table_stride = block_table_stride;
  p.out = pointer<void>(out);
  p.lse = pointer<float>(lse);
  p.stream = pointer<void>(stream);
  return p;
}

// The GIL stays held, here and below: the calls only enqueue.
void decode(int dtype, std::array<int, 4> shape, int page_size, int num_pages, int num_parts,
            bool causal, float softmax_scale, uintptr_t q_latent, Strides q_latent_strides,
            uintptr_t q_rope, Strides q_rope_strides, uintptr_t kv, Strides kv_strides,
            uintptr_t seq_lens, uintptr_t block_table, int64_t block_table_stride, uintptr_t items,
            uintptr_t part_offsets, uintptr_t split_offsets, uintptr_t query_offsets,
            uintptr_t planned_lens, uintptr_t faults, uintptr_t out, uintptr_t lse,
            uintptr_t partial_out, uintptr_t partial_lse, int max_leaves, uintptr_t rooms,
            uintptr_t stream) {
  flashmla_decode_params p = decode_params(
      dtype, shape, page_size, num_pages, causal, softmax_scale, q_latent, q_latent_strides, q_rope,
      q_rope_strides, kv, kv_strides, seq_lens, block_table, block_table_stride, out, lse, stream);
  p.num_parts = num_parts;
  p.items = pointer<const int32_t>(items);
  p.part_offsets = pointer<const int32_t>(part_offsets);
  p.split_offsets = pointer<const int32_t>(split_offsets);
  p.query_offsets = pointer<const int32_t>(query_offsets);
  p.planned_lens = pointer<const int32_t>(planned_lens);
  p.faults = pointer<flashmla_fault_box>(faults);
  p.partial_out = pointer<void>(partial_out);
  p.partial_lse = pointer<void>(partial_lse);
  p.max_leaves = max_leaves;
  p.rooms = pointer<float>(rooms);
  check(flashmla_decode(&p));
}

// The textbook kernel, for `flashmla bench`; it needs no schedule.
void naive_decode(int dtype, std::array<int, 4> shape, int page_size, int num_pages, bool causal,
                  float softmax_scale, uintptr_t q_latent, Strides q_latent_strides,
                  uintptr_t q_rope, Strides q_rope_strides, uintptr_t kv, Strides kv_strides,
                  uintptr_t seq_lens, uintptr_t block_table, int64_t block_table_stride,
                  uintptr_t out, uintptr_t lse, uintptr_t stream) {
  const flashmla_decode_params p = decode_params(
      dtype, shape, page_size, num_pages, causal, softmax_scale, q_latent, q_latent_strides, q_rope,
      q_rope_strides, kv, kv_strides, seq_lens, block_table, block_table_stride, out, lse, stream);
  check(flashmla_naive_decode(&p));
}

void schedule(int batch, int num_parts, int max_leaves, std::array<int, 6> cost, uintptr_t seq_lens,
              uintptr_t items, uintptr_t part_offsets, uintptr_t split_offsets, uintptr_t stream) {
  flashmla_schedule_params p{};
  p.batch = batch;
  p.num_parts = num_parts;
  p.max_leaves = max_leaves;
  p.cost = {cost[0], cost[1], cost[2], cost[3], cost[4], cost[5]};
  p.seq_lens = pointer<const int32_t>(seq_lens);
  p.items = pointer<int32_t>(items);
  p.part_offsets = pointer<int32_t>(part_offsets);
  p.split_offsets = pointer<int32_t>(split_offsets);
  p.stream = pointer<void>(stream);
  check(flashmla_schedule(&p));
}

void check_bounds(int batch, int page_size, int num_pages, uintptr_t seq_lens,
                  uintptr_t block_table, int64_t block_table_stride, int table_width,
                  uintptr_t planned_lens, uintptr_t faults, uintptr_t stream) {
  flashmla_bounds_params p{};
  p.batch = batch;
  p.page_size = page_size;
  p.num_pages = num_pages;
  p.seq_lens = pointer<const int32_t>(seq_lens);
  p.block_table = pointer<const int32_t>(block_table);
  p.block_table_stride = block_table_stride;
  p.table_width = table_width;
  p.planned_lens = pointer<int32_t>(planned_lens);
  p.faults = pointer<flashmla_fault_box>(faults);
  p.stream = pointer<void>(stream);
  check(flashmla_check_bounds(&p));
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.def("build_info", &build_info);
  module.def("device_count", &device_count);
  module.def("device", &device, "index"_a);
  module.def("probe", &probe, "index"_a);
  module.def("decode", &decode, "dtype"_a, "shape"_a, "page_size"_a, "num_pages"_a, "num_parts"_a,
             "causal"_a, "softmax_scale"_a, "q_latent"_a, "q_latent_strides"_a, "q_rope"_a,
             "q_rope_strides"_a, "kv"_a, "kv_strides"_a, "seq_lens"_a, "block_table"_a,
             "block_table_stride"_a, "items"_a, "part_offsets"_a, "split_offsets"_a,
             "query_offsets"_a, "planned_lens"_a, "faults"_a, "out"_a, "lse"_a, "partial_out"_a,
             "partial_lse"_a, "max_leaves"_a, "rooms"_a, "stream"_a);
  module.def("naive_decode", &naive_decode, "dtype"_a, "shape"_a, "page_size"_a, "num_pages"_a,
             "causal"_a, "softmax_scale"_a, "q_latent"_a, "q_latent_strides"_a, "q_rope"_a,
             "q_rope_strides"_a, "kv"_a, "kv_strides"_a, "seq_lens"_a, "block_table"_a,
             "block_table_stride"_a, "out"_a, "lse"_a, "stream"_a);
  module.def("schedule", &schedule, "batch"_a, "num_parts"_a, "max_leaves"_a, "cost"_a,
             "seq_lens"_a, "items"_a, "part_offsets"_a, "split_offsets"_a, "stream"_a);
  module.def("check_bounds", &check_bounds, "batch"_a, "page_size"_a, "num_pages"_a, "seq_lens"_a,
             "block_table"_a, "block_table_stride"_a, "table_width"_a, "planned_lens"_a, "faults"_a,
             "stream"_a);
}
