// Fuzz target for what the C ABI is passed: validation must neither crash nor disagree with the
// limits that include/flashmla/*.h document, written down a second time here. Host code only, for
// sanitizers:
//   g++ -std=c++17 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Ikernels
//   -Ikernels/include
//       kernels/tools/validate_fuzz.cpp kernels/host/validate.cpp kernels/host/error.cpp
//   ./a.out 200000 0                                                     cases and seed
// With clang's -fsanitize=fuzzer and -DFLASHMLA_LIBFUZZER it is a libFuzzer target.
#include <algorithm>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>
#include <vector>

#include "host/validate.h"

namespace {

constexpr uintptr_t kAddress = 0x7000'0000'0080;

// Values made of bytes, zeros once they run out.
class Source {
 public:
  Source(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  template <typename T>
  T take() {
    T value{};
    const size_t bytes = std::min(sizeof(T), size_);
    if (bytes > 0) std::memcpy(&value, data_, bytes);
    data_ += bytes;
    size_ -= bytes;
    return value;
  }

  // Mostly `good`, now and then something near it, at the edge of its type, or anything.
  template <typename T>
  T number(T good) {
    using Limits = std::numeric_limits<T>;
    switch (take<uint8_t>()) {
      case 1:
        return 0;
      case 2:
        return T(good + 1);
      case 3:
        return T(good - 1);
      case 4:
        return Limits::max();
      case 5:
        return Limits::lowest();
      case 6:
        return T(-good);
      case 7:
        return T(8 * (take<uint16_t>() + T{1}));
      case 8:
        return take<T>();
      case 9:
        return T(take<uint8_t>());
      case 10:
        return T(65535 + take<uint8_t>() % 3);
      default:
        return good;
    }
  }

  float scale() {
    switch (take<uint8_t>()) {
      case 1:
        return 0.0f;
      case 2:
        return -0.1f;
      case 3:
        return std::numeric_limits<float>::infinity();
      case 4:
        return std::numeric_limits<float>::quiet_NaN();
      case 5:
        return std::numeric_limits<float>::denorm_min();
      case 6:
        return take<float>();
      default:
        return 0.1f;
    }
  }

  // Mostly `good`, by default an address that nobody may follow.
  template <typename T>
  T* address(uintptr_t good = kAddress) {
    return reinterpret_cast<T*>(number(good));
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

bool within(int64_t value, int64_t least, int64_t most) { return least <= value && value <= most; }

bool aligned(const void* pointer, uintptr_t bytes) {
  return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// A stride in elements; kernels hold those in bytes in 40 bits.
bool strides(std::initializer_list<int64_t> values, int64_t least) {
  for (const int64_t value : values)
    if (value % 8 != 0 || !within(value, least, (int64_t{1} << 39) - 1)) return false;
  return true;
}

bool leaves(int value) { return within(value, 0, 128) && (value & (value - 1)) == 0; }

// What decode.h documents.
bool documented(const flashmla_decode_params& p) {
  if (!within(p.dtype, 0, 1) || p.batch < 0 || p.s_q < 1 || p.h_q < 1) return false;
  if (!within(p.h_kv, 1, 65535) || p.h_q % p.h_kv != 0 || !within(p.num_parts, 1, 65535))
    return false;
  if (p.page_size != 16 && p.page_size != 32 && (p.page_size < 64 || p.page_size % 64 != 0))
    return false;
  if (p.num_pages < 1) return false;
  if (static_cast<__int128>(p.batch) * p.s_q * p.h_q > INT_MAX) return false;
  if (!(p.softmax_scale > 0.0f && p.softmax_scale <= std::numeric_limits<float>::max()))
    return false;
  if (!leaves(p.max_leaves)) return false;
  if (p.batch == 0) return true;  // nothing is read
  if (p.block_table_stride < 0) return false;
  for (const flashmla_query& q : {p.q_latent, p.q_rope})
    if (!strides({q.batch_stride, q.token_stride, q.head_stride}, 0) || !aligned(q.data, 16))
      return false;
  if (p.query_offsets != nullptr &&
      (!aligned(p.query_offsets, 4) || p.max_leaves != 0 || p.planned_lens != nullptr))
    return false;
  return strides({p.kv_page_stride, p.kv_row_stride, p.kv_head_stride}, 8) && aligned(p.kv, 16) &&
         aligned(p.seq_lens, 4) && aligned(p.block_table, 4) && aligned(p.items, 16) &&
         aligned(p.part_offsets, 4) && aligned(p.split_offsets, 4) && aligned(p.out, 16) &&
         aligned(p.lse, 4) && aligned(p.partial_out, 128) && aligned(p.partial_lse, 8) &&
         (p.planned_lens == nullptr || (aligned(p.planned_lens, 4) && aligned(p.faults, 8))) &&
         (p.max_leaves <= 1 || aligned(p.rooms, 128));
}

// What bounds.h documents.
bool documented(const flashmla_bounds_params& p) {
  if (p.batch < 0 || p.page_size < 1 || p.num_pages < 1 || p.table_width < 0) return false;
  if (p.batch == 0) return true;  // nothing is read
  return (p.batch == 1 || p.block_table_stride >= p.table_width) && aligned(p.seq_lens, 4) &&
         (p.table_width == 0 || aligned(p.block_table, 4)) && aligned(p.planned_lens, 4) &&
         aligned(p.faults, 8);
}

// What schedule.h documents.
bool documented(const flashmla_schedule_params& p) {
  const flashmla_cost_model& c = p.cost;
  for (const int cost : {c.page, c.item, c.empty_item, c.memory, c.reduction, c.partial})
    if (!within(cost, 1, 65535)) return false;
  return within(p.batch, 0, 8192) && within(p.num_parts, 1, 512) && leaves(p.max_leaves) &&
         c.empty_item < c.item + c.page && (p.batch == 0 || aligned(p.seq_lens, 4)) &&
         aligned(p.items, 16) && aligned(p.part_offsets, 4) && aligned(p.split_offsets, 4);
}

[[noreturn]] void stop(const char* what, const char* problem) {
  std::printf("FAIL %s: %s; last error: %s\n", what, problem, flashmla_last_error());
  std::fflush(stdout);
  std::abort();
}

// Whether the parameters were accepted.
bool judge(const char* what, flashmla_status status, bool documented) {
  if (status != FLASHMLA_OK && status != FLASHMLA_INVALID_ARGUMENT)
    stop(what, "status is neither OK nor INVALID_ARGUMENT");
  if (status == FLASHMLA_OK && !documented) stop(what, "accepted outside the documented limits");
  if (status != FLASHMLA_OK && documented) stop(what, "refused within the documented limits");
  if (status != FLASHMLA_OK && std::strstr(flashmla_last_error(), "accepted:") == nullptr)
    stop(what, "refused without saying what is accepted");
  return status == FLASHMLA_OK;
}

// `ragged`: mostly with query_offsets, else mostly with all that is refused beside them.
bool fuzz_decode(Source source, bool ragged) {
  flashmla_decode_params p{};
  p.dtype = source.number<int>(FLASHMLA_FP16);
  p.batch = source.number(3);
  p.s_q = source.number(2);
  p.h_q = source.number(16);
  p.h_kv = source.number(2);
  p.page_size = source.number(source.take<uint8_t>() % 2 == 0 ? 16 : 64);
  p.num_pages = source.number(10);
  p.num_parts = source.number(132);
  p.causal = source.number(1);
  p.softmax_scale = source.scale();
  for (flashmla_query* q : {&p.q_latent, &p.q_rope}) {
    q->data = source.address<void>();
    q->batch_stride = source.number<int64_t>(18432);
    q->token_stride = source.number<int64_t>(9216);
    q->head_stride = source.number<int64_t>(576);
  }
  p.kv = source.address<void>();
  p.kv_page_stride = source.number<int64_t>(73728);
  p.kv_row_stride = source.number<int64_t>(1152);
  p.kv_head_stride = source.number<int64_t>(576);
  p.seq_lens = source.address<int32_t>();
  p.block_table = source.address<int32_t>();
  p.block_table_stride = source.number<int64_t>(4);
  p.items = source.address<int32_t>();
  p.part_offsets = source.address<int32_t>();
  p.split_offsets = source.address<int32_t>();
  p.out = source.address<void>();
  p.lse = source.address<float>();
  p.partial_out = source.address<void>();
  p.partial_lse = source.address<void>();
  p.query_offsets = source.address<int32_t>(ragged ? kAddress : 0);
  p.planned_lens = source.address<int32_t>(ragged ? 0 : kAddress);
  p.faults = source.address<flashmla_fault_box>();
  p.max_leaves = source.number(ragged ? 0 : 16);
  p.rooms = source.address<float>();
  return judge(ragged ? "ragged decode" : "decode", flashmla::validate(p), documented(p));
}

bool fuzz_schedule(Source source) {
  flashmla_schedule_params p{};
  p.batch = source.number(8192);
  p.num_parts = source.number(512);
  p.cost = {source.number(1800), source.number(2400), source.number(300),
            source.number(24),   source.number(1300), source.number(128)};
  p.seq_lens = source.address<int32_t>();
  p.items = source.address<int32_t>();
  p.part_offsets = source.address<int32_t>();
  p.split_offsets = source.address<int32_t>();
  p.max_leaves = source.number(16);
  return judge("schedule", flashmla::validate(p), documented(p));
}

bool fuzz_bounds(Source source) {
  flashmla_bounds_params p{};
  p.batch = source.number(3);
  p.page_size = source.number(64);
  p.num_pages = source.number(10);
  p.seq_lens = source.address<int32_t>();
  p.block_table = source.address<int32_t>();
  p.block_table_stride = source.number<int64_t>(4);
  p.table_width = source.number(4);
  p.planned_lens = source.address<int32_t>();
  p.faults = source.address<flashmla_fault_box>();
  return judge("bounds", flashmla::validate(p), documented(p));
}

}  // namespace

#ifdef FLASHMLA_LIBFUZZER

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz_decode({data, size}, false);
  fuzz_decode({data, size}, true);
  fuzz_schedule({data, size});
  fuzz_bounds({data, size});
  return 0;
}

#else

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 200000;
  std::mt19937 random(argc > 2 ? std::atoi(argv[2]) : 0);
  std::vector<uint8_t> bytes(512);
  int decodes = 0, ragged = 0, schedules = 0, bounds = 0;
  for (int i = 0; i < cases; ++i) {
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random() >> 5);
    decodes += fuzz_decode({bytes.data(), bytes.size()}, false);
    ragged += fuzz_decode({bytes.data(), bytes.size()}, true);
    schedules += fuzz_schedule({bytes.data(), bytes.size()});
    bounds += fuzz_bounds({bytes.data(), bytes.size()});
  }
  std::printf("OK %d cases each: %d decodes, %d ragged, %d schedules, %d bounds accepted\n", cases,
              decodes, ragged, schedules, bounds);
  return 0;
}

#endif
