#include "host/validate.h"

#include <climits>
#include <cmath>

#include "host/error.h"

namespace flashmla {
namespace {

constexpr int kMaxGrid = 65535;  // of the y and z dimension of a grid
constexpr int kTileTokens = 64;
constexpr int kMaxCost = 65535;
constexpr int64_t kMaxStride = int64_t{1} << 39;  // a tensor map holds 40 bits of bytes

flashmla_status check_range(const char* name, int value, int least, int most) {
  if (value >= least && value <= most) return FLASHMLA_OK;
  return fail(FLASHMLA_INVALID_ARGUMENT, "%s is %d; accepted: %d to %d", name, value, least, most);
}

flashmla_status check_pointer(const char* name, const void* pointer, unsigned alignment) {
  if (pointer == nullptr)
    return fail(FLASHMLA_INVALID_ARGUMENT, "%s is null; accepted: a device pointer", name);
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
    return fail(FLASHMLA_INVALID_ARGUMENT,
                "%s is at %p; accepted: a device pointer aligned to %u bytes", name, pointer,
                alignment);
  }
  return FLASHMLA_OK;
}

flashmla_status check_max_leaves(int value) {
  if (value >= 0 && value <= FLASHMLA_MAX_LEAVES && (value & (value - 1)) == 0) return FLASHMLA_OK;
  return fail(FLASHMLA_INVALID_ARGUMENT, "max_leaves is %d; accepted: 0 or a power of two up to %d",
              value, FLASHMLA_MAX_LEAVES);
}

flashmla_status check_stride(const char* name, int64_t stride, int64_t least) {
  if (stride >= least && stride < kMaxStride && stride % 8 == 0) return FLASHMLA_OK;
  return fail(FLASHMLA_INVALID_ARGUMENT,
              "%s is %lld elements; accepted: a multiple of 8 from %lld up, so that every row is "
              "aligned to 16 bytes",
              name, static_cast<long long>(stride), static_cast<long long>(least));
}

flashmla_status check_planned(const flashmla_decode_params& p) {
  if (p.planned_lens == nullptr) return FLASHMLA_OK;
  if (const flashmla_status status = check_pointer("planned_lens", p.planned_lens, 4))
    return status;
  return check_pointer("faults", p.faults, 8);
}

flashmla_status check_ragged(const flashmla_decode_params& p) {
  if (p.query_offsets == nullptr) return FLASHMLA_OK;
  if (p.max_leaves != 0) {
    return fail(FLASHMLA_INVALID_ARGUMENT,
                "query_offsets was given and max_leaves is %d; accepted: 0 with query_offsets",
                p.max_leaves);
  }
  if (p.planned_lens != nullptr) {
    return fail(FLASHMLA_INVALID_ARGUMENT,
                "query_offsets and planned_lens were both given; accepted: one of them");
  }
  return check_pointer("query_offsets", p.query_offsets, 4);
}

// The first check that does not hold.
template <typename... Checks>
flashmla_status first_failure(const Checks&... checks) {
  flashmla_status status = FLASHMLA_OK;
  static_cast<void>(((status = checks(), status == FLASHMLA_OK) && ...));
  return status;
}

}  // namespace

flashmla_status validate(const flashmla_bounds_params& p) {
  const flashmla_status numbers =
      first_failure([&] { return check_range("batch", p.batch, 0, INT_MAX); },
                    [&] { return check_range("page_size", p.page_size, 1, INT_MAX); },
                    [&] { return check_range("num_pages", p.num_pages, 1, INT_MAX); },
                    [&] { return check_range("table_width", p.table_width, 0, INT_MAX); });
  if (numbers != FLASHMLA_OK || p.batch == 0) return numbers;
  if (p.batch > 1 && p.block_table_stride < p.table_width) {
    return fail(FLASHMLA_INVALID_ARGUMENT,
                "block_table_stride is %lld elements; accepted: at least table_width, %d",
                static_cast<long long>(p.block_table_stride), p.table_width);
  }
  return first_failure([&] { return check_pointer("seq_lens", p.seq_lens, 4); },
                       [&] {
                         return p.table_width == 0 ? FLASHMLA_OK
                                                   : check_pointer("block_table", p.block_table, 4);
                       },
                       [&] { return check_pointer("planned_lens", p.planned_lens, 4); },
                       [&] { return check_pointer("faults", p.faults, 8); });
}

flashmla_status validate(const flashmla_decode_params& p) {
  const auto range = [](const char* name, int value, int least, int most) {
    return [=] { return check_range(name, value, least, most); };
  };
  const auto pointer = [](const char* name, const void* value, unsigned alignment) {
    return [=] { return check_pointer(name, value, alignment); };
  };
  const auto stride = [](const char* name, int64_t value, int64_t least) {
    return [=] { return check_stride(name, value, least); };
  };
  const flashmla_status shapes = first_failure(
      range("dtype", p.dtype, FLASHMLA_BF16, FLASHMLA_FP16), range("batch", p.batch, 0, INT_MAX),
      range("s_q", p.s_q, 1, INT_MAX), range("h_q", p.h_q, 1, INT_MAX),
      range("h_kv", p.h_kv, 1, kMaxGrid), range("num_parts", p.num_parts, 1, kMaxGrid),
      range("num_pages", p.num_pages, 1, INT_MAX), range("page_size", p.page_size, 1, INT_MAX),
      [&] { return check_max_leaves(p.max_leaves); });
  if (shapes != FLASHMLA_OK) return shapes;
  if (p.h_q % p.h_kv != 0) {
    return fail(FLASHMLA_INVALID_ARGUMENT, "h_q is %d, h_kv %d; accepted: h_q a multiple of h_kv",
                p.h_q, p.h_kv);
  }
  if (p.page_size != 16 && p.page_size != 32 && p.page_size % kTileTokens != 0) {
    return fail(FLASHMLA_INVALID_ARGUMENT,
                "page_size is %d; accepted: 16, 32 or a multiple of %d tokens", p.page_size,
                kTileTokens);
  }
  if (p.batch > 0 && p.s_q > INT_MAX / p.h_q / p.batch) {
    return fail(FLASHMLA_INVALID_ARGUMENT,
                "batch %d, s_q %d and h_q %d make too many output rows; accepted: a product of at "
                "most %d",
                p.batch, p.s_q, p.h_q, INT_MAX);
  }
  if (!(p.softmax_scale > 0.0f) || !std::isfinite(p.softmax_scale)) {
    return fail(FLASHMLA_INVALID_ARGUMENT,
                "softmax_scale is %g; accepted: a finite number greater than 0",
                static_cast<double>(p.softmax_scale));
  }
  if (p.batch == 0) return FLASHMLA_OK;  // tensors without elements have no address
  if (p.block_table_stride < 0) {
    return fail(FLASHMLA_INVALID_ARGUMENT,
                "block_table_stride is %lld elements; accepted: 0 or more",
                static_cast<long long>(p.block_table_stride));
  }
  return first_failure(
      stride("q_latent.batch_stride", p.q_latent.batch_stride, 0),
      stride("q_latent.token_stride", p.q_latent.token_stride, 0),
      stride("q_latent.head_stride", p.q_latent.head_stride, 0),
      stride("q_rope.batch_stride", p.q_rope.batch_stride, 0),
      stride("q_rope.token_stride", p.q_rope.token_stride, 0),
      stride("q_rope.head_stride", p.q_rope.head_stride, 0),
      stride("kv_page_stride", p.kv_page_stride, 8), stride("kv_row_stride", p.kv_row_stride, 8),
      stride("kv_head_stride", p.kv_head_stride, 8), pointer("q_latent", p.q_latent.data, 16),
      pointer("q_rope", p.q_rope.data, 16), pointer("kv", p.kv, 16),
      pointer("seq_lens", p.seq_lens, 4), pointer("block_table", p.block_table, 4),
      pointer("items", p.items, 16), pointer("part_offsets", p.part_offsets, 4),
      pointer("split_offsets", p.split_offsets, 4), [&] { return check_planned(p); },
      [&] { return check_ragged(p); }, pointer("out", p.out, 16), pointer("lse", p.lse, 4),
      pointer("partial_out", p.partial_out, 128), pointer("partial_lse", p.partial_lse, 8),
      [&] { return p.max_leaves > 1 ? check_pointer("rooms", p.rooms, 128) : FLASHMLA_OK; });
}

flashmla_status validate(const flashmla_schedule_params& p) {
  const auto cost = [](const char* name, int value) {
    return [=] { return check_range(name, value, 1, kMaxCost); };
  };
  const flashmla_status numbers = first_failure(
      [&] { return check_range("batch", p.batch, 0, FLASHMLA_SCHEDULE_MAX_BATCH); },
      [&] { return check_range("num_parts", p.num_parts, 1, FLASHMLA_SCHEDULE_MAX_PARTS); },
      [&] { return check_max_leaves(p.max_leaves); }, cost("cost.page", p.cost.page),
      cost("cost.item", p.cost.item), cost("cost.empty_item", p.cost.empty_item),
      cost("cost.memory", p.cost.memory), cost("cost.reduction", p.cost.reduction),
      cost("cost.partial", p.cost.partial));
  if (numbers != FLASHMLA_OK) return numbers;
  if (p.cost.empty_item >= p.cost.item + p.cost.page) {
    return fail(FLASHMLA_INVALID_ARGUMENT,
                "cost.empty_item is %d; accepted: less than cost.item + cost.page, %d",
                p.cost.empty_item, p.cost.item + p.cost.page);
  }
  if (p.batch > 0) {
    if (const flashmla_status status = check_pointer("seq_lens", p.seq_lens, 4)) return status;
  }
  return first_failure([&] { return check_pointer("items", p.items, 16); },
                       [&] { return check_pointer("part_offsets", p.part_offsets, 4); },
                       [&] { return check_pointer("split_offsets", p.split_offsets, 4); });
}

}  // namespace flashmla
