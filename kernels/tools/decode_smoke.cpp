// Small decodes on the GPU with no Python in sight, against double precision on the host: with a
// schedule made by hand, with the device scheduler's, with lengths out of bounds, with requests
// that differ in their query tokens, and by the textbook kernel. Prints one line for each case.
// Exit code: 0 all are right, 1 one is not, 2 no device.
#include <cuda_runtime_api.h>

#include <climits>
#include <cstdio>
#include <memory>

#include "decode_problem.h"
#include "device_room.h"
#include "flashmla/bounds.h"
#include "flashmla/device.h"
#include "flashmla/naive.h"
#include "flashmla/schedule.h"

namespace {

// Work items of one step; without them the device scheduler makes a schedule for `parts`.
struct Plan {
  int parts;
  std::vector<int32_t> items, part_offsets, split_offsets;
};

class Case {
 public:
  Case(const Shape& shape, const Plan& plan)
      : shape_(shape),
        plan_(plan),
        problem_(make_problem(shape)),
        expected_(host_decode(problem_)),
        q_(problem_.q),
        kv_(problem_.kv),
        table_(problem_.table),
        seq_lens_(shape.lengths),
        query_offsets_(shape.query_offsets()),
        items_(4 * std::max(shape.batch(), FLASHMLA_SCHEDULE_MAX_ROUNDS * plan.parts)),
        part_offsets_(plan.parts + 1),
        split_offsets_(shape.batch() + 1),
        out_(expected_.out.size() + shape.spare_tokens() * shape.h_q * kLatent),
        lse_(expected_.lse.size() + shape.spare_tokens() * shape.h_q),
        partial_out_(size_t{1} * FLASHMLA_SCHEDULE_MAX_ROUNDS * plan.parts * shape.rows() *
                     kLatent / 2),  // of fp16
        partial_lse_(size_t{4} * FLASHMLA_SCHEDULE_MAX_ROUNDS * plan.parts * shape.rows()) {
    if (plan.items.empty()) return;
    items_ = Room<int32_t>(plan.items);
    part_offsets_ = Room<int32_t>(plan.part_offsets);
    split_offsets_ = Room<int32_t>(plan.split_offsets);
  }

  // Schedule and two layers, which share the workspaces, one right after the other.
  bool decode() {
    const flashmla_decode_params params = decode_params();
    return judge("decode", [&] {
      if (plan_.items.empty()) {
        const flashmla_schedule_params schedule = schedule_params();
        if (const flashmla_status status = flashmla_schedule(&schedule)) return status;
      }
      if (const flashmla_status status = flashmla_decode(&params)) return status;
      return flashmla_decode(&params);
    });
  }

  // The same where requests without tokens have lengths that the table does not hold: the answer is
  // that of no tokens, and one of these requests is reported.
  bool checked_decode() {
    std::vector<int32_t> lengths = shape_.lengths;
    for (int32_t& length : lengths) length = length == 0 ? INT_MAX : length;
    const Room<int32_t> spoilt(lengths), planned_lens(lengths.size());
    void* host = nullptr;
    check(cudaHostAlloc(&host, sizeof(flashmla_fault), cudaHostAllocMapped), "cudaHostAlloc");
    const std::unique_ptr<void, cudaError_t (*)(void*)> owner(host, &cudaFreeHost);
    auto* fault = new (host) flashmla_fault{};
    const Room<flashmla_fault_box> box(std::vector<flashmla_fault_box>{{0, fault}});

    flashmla_bounds_params bounds{};
    bounds.batch = shape_.batch();
    bounds.page_size = shape_.page_size;
    bounds.num_pages = shape_.num_pages();
    bounds.seq_lens = spoilt.get();
    bounds.block_table = table_.get();
    bounds.block_table_stride = bounds.table_width = shape_.table_width();
    bounds.planned_lens = planned_lens.get();
    bounds.faults = box.get();
    flashmla_schedule_params schedule = schedule_params();
    schedule.seq_lens = planned_lens.get();
    flashmla_decode_params params = decode_params();
    params.seq_lens = spoilt.get();
    params.planned_lens = planned_lens.get();
    params.faults = box.get();
    const bool right = judge("checked", [&] {
      if (const flashmla_status status = flashmla_check_bounds(&bounds)) return status;
      if (const flashmla_status status = flashmla_schedule(&schedule)) return status;
      return flashmla_decode(&params);
    });
    const bool told = fault->kind == FLASHMLA_FAULT_LENGTH && fault->value == INT_MAX &&
                      shape_.lengths[fault->request] == 0;
    std::printf("%s fault of kind %d, request %d, value %d\n", told ? "OK" : "FAIL", fault->kind,
                fault->request, fault->value);
    return right && told;
  }

  // Batch-invariant mode, with trees of up to 16 leaves.
  bool invariant_decode() {
    constexpr int kMaxLeaves = 16, kLevels = 4;
    const int rows = shape_.rows() / shape_.h_kv, tiles = (rows + 63) / 64;
    const Room<float> rooms(size_t{1} * plan_.parts * shape_.h_kv * tiles * kLevels *
                            std::clamp((rows + 15) / 16, 2, 4) * FLASHMLA_ROOM_FLOATS_OF_16_ROWS);
    flashmla_schedule_params schedule = schedule_params();
    flashmla_decode_params params = decode_params();
    schedule.max_leaves = params.max_leaves = kMaxLeaves;
    params.rooms = rooms.get();
    return judge("batch-invariant", [&] {
      if (const flashmla_status status = flashmla_schedule(&schedule)) return status;
      if (const flashmla_status status = flashmla_decode(&params)) return status;
      return flashmla_decode(&params);
    });
  }

  bool naive_decode() {
    const flashmla_decode_params params = decode_params();
    return judge("naive", [&] { return flashmla_naive_decode(&params); });
  }

 private:
  flashmla_decode_params decode_params() const {
    flashmla_decode_params p{};
    p.dtype = shape_.dtype;
    p.batch = shape_.batch();
    p.s_q = shape_.s_q;
    p.h_q = shape_.h_q;
    p.h_kv = shape_.h_kv;
    p.page_size = shape_.page_size;
    p.num_pages = shape_.num_pages();
    p.num_parts = plan_.parts;
    p.causal = shape_.causal;
    p.softmax_scale = shape_.scale;
    p.q_latent = {q_.get(), shape_.ragged() ? kPoisonStride : shape_.rows() * kWidth,
                  shape_.h_q * kWidth, kWidth};
    p.q_rope = p.q_latent;
    p.q_rope.data = q_.get() + kLatent;
    p.kv = kv_.get();
    p.kv_page_stride = shape_.page_size * shape_.h_kv * kWidth;
    p.kv_row_stride = shape_.h_kv * kWidth;
    p.kv_head_stride = kWidth;
    p.seq_lens = seq_lens_.get();
    p.block_table = table_.get();
    p.block_table_stride = shape_.table_width();
    p.items = items_.get();
    p.part_offsets = part_offsets_.get();
    p.split_offsets = split_offsets_.get();
    p.query_offsets = shape_.ragged() ? query_offsets_.get() : nullptr;
    p.out = out_.get();
    p.lse = lse_.get();
    p.partial_out = partial_out_.get();
    p.partial_lse = partial_lse_.get();
    return p;
  }

  flashmla_schedule_params schedule_params() const {
    flashmla_schedule_params p{};
    p.batch = shape_.batch();
    p.num_parts = plan_.parts;
    p.cost = {1400, 2400, 300, 24, 2000, 48};
    p.seq_lens = seq_lens_.get();
    p.items = items_.get();
    p.part_offsets = part_offsets_.get();
    p.split_offsets = split_offsets_.get();
    return p;
  }

  template <typename Launch>
  bool judge(const char* what, const Launch& launch) {
    out_.poison();
    lse_.poison();
    if (launch() != FLASHMLA_OK) {
      std::printf("FAIL %s, %s: %s\n", what, shape_.name, flashmla_last_error());
      return false;
    }
    check(cudaDeviceSynchronize(), what);
    return compare(what);
  }

  // Within an absolute or a relative bound; equal infinities are right, NaN never is.
  static bool near(double x, double expected, double absolute, double relative) {
    if (x == expected) return true;
    const double error = std::fabs(x - expected);
    return error <= absolute || error <= relative * std::fabs(expected);
  }

  bool compare(const char* what) const {
    const auto out = out_.to_host();
    const auto lse = lse_.to_host();
    int wrong = 0;
    double worst = 0;
    for (size_t i = 0; i < expected_.out.size(); ++i) {
      const double x = from_bits(out[i], shape_.dtype);
      wrong += !near(x, expected_.out[i], 8e-4, 2.01 / 128);
      worst = std::max(worst, std::fabs(x - expected_.out[i]));
    }
    for (size_t i = 0; i < expected_.lse.size(); ++i)
      wrong += !near(lse[i], expected_.lse[i], 1e-6, 8.01 / 65536);
    wrong += Room<uint16_t>::overwritten(out, expected_.out.size());
    wrong += Room<float>::overwritten(lse, expected_.lse.size());
    std::printf("%s %s, %s: %d of %zu values out of bounds, largest error of out %.2e\n",
                wrong ? "FAIL" : "OK", what, shape_.name, wrong, out.size() + lse.size(), worst);
    return wrong == 0;
  }

  Shape shape_;
  Plan plan_;
  Problem problem_;
  Answer expected_;
  Room<uint16_t> q_, kv_;
  Room<int32_t> table_, seq_lens_, query_offsets_, items_, part_offsets_, split_offsets_;
  Room<uint16_t> out_;
  Room<float> lse_, partial_out_, partial_lse_;
};

// Request 0 is one item, request 1 is cut after 6 of its 11 pages, request 2 is empty.
const Plan kByHand = {
    3,
    {0, 0, 4, -1,  //
     1, 0, 6, 0,   //
     2, 0, 0, -1,  //
     1, 6, 11, 1},
    {0, 1, 3, 4},
    {0, 0, 2, 2},
};

Plan device_schedule(int parts) { return {parts, {}, {}, {}}; }

}  // namespace

int main() {
  int devices = 0;
  if (flashmla_device_count(&devices) != FLASHMLA_OK) {
    std::printf("FAIL %s\n", flashmla_last_error());
    return 1;
  }
  if (devices == 0) {
    std::printf("no CUDA device\n");
    return 2;
  }

  const Shape by_hand = {
      "20 heads, schedule by hand", FLASHMLA_BF16, 2, 20, 1, 64, true, 0.07f, {200, 700, 0}};
  const Shape cut = {"16 heads, long requests cut", FLASHMLA_FP16, 1, 16, 1, 64, true, 0.07f,
                     {1, 64, 65, 2500, 0, 900}};
  const Shape many = {"16 heads, many items of a part",
                      FLASHMLA_BF16,
                      1,
                      16,
                      1,
                      64,
                      true,
                      0.07f,
                      {130, 5, 64, 200, 0, 77, 128, 129, 1, 250, 63, 65}};
  const Shape row_tiles = {
      "128 heads, two row tiles", FLASHMLA_BF16, 1, 128, 1, 64, true, 0.07f, {500, 90}};
  const Shape kv_heads = {"two KV heads, pages of 128, no mask",
                          FLASHMLA_FP16,
                          3,
                          12,
                          2,
                          128,
                          false,
                          0.07f,
                          {300, 129, 2}};
  const Shape small_pages = {"20 heads, pages of 16",     FLASHMLA_BF16, 2, 20, 1, 16, true, 0.07f,
                             {700, 1, 0, 16, 17, 64, 130}};
  const Shape half_tiles = {
      "two KV heads, pages of 32", FLASHMLA_FP16, 1, 12, 2, 32, true, 0.07f, {33, 300, 96, 0}};
  Shape many_rows = {"32 heads, more half rows than warps of the combine",
                     FLASHMLA_BF16,
                     1,
                     32,
                     1,
                     64,
                     true,
                     0.07f,
                     std::vector<int32_t>(40, 70)};
  many_rows.lengths[0] = many_rows.lengths[37] = 1500;
  // Each has requests that are cut and ask fewer queries than others, an empty one, and one with
  // fewer tokens than queries.
  const Shape ragged = {"16 heads, 1 to 4 queries", FLASHMLA_BF16,  4, 16, 1, 64, true, 0.07f,
                        {900, 2500, 1, 0, 65},      {1, 4, 2, 3, 1}};
  const Shape ragged_row_tiles = {
      "128 heads, 1 or 2 queries", FLASHMLA_FP16,  2, 128, 1, 64, true, 0.07f,
      {700, 330, 0, 1, 90},        {2, 1, 1, 2, 1}};
  const Shape ragged_small_pages = {"20 heads, 1 to 7 queries, pages of 16",
                                    FLASHMLA_BF16,
                                    7,
                                    20,
                                    1,
                                    16,
                                    true,
                                    0.07f,
                                    {200, 1, 3, 700, 0, 64},
                                    {7, 1, 5, 3, 4, 2}};
  const Shape ragged_kv_heads = {"two KV heads, 1 to 3 queries, no mask",
                                 FLASHMLA_FP16,
                                 3,
                                 12,
                                 2,
                                 128,
                                 false,
                                 0.07f,
                                 {1000, 2, 0, 129},
                                 {2, 3, 2, 1}};
  Case cases[] = {{by_hand, kByHand},
                  {cut, device_schedule(8)},
                  {many, device_schedule(3)},
                  {row_tiles, device_schedule(4)},
                  {kv_heads, device_schedule(4)},
                  {small_pages, device_schedule(3)},
                  {half_tiles, device_schedule(4)},
                  {many_rows, device_schedule(8)}};
  bool right = true;
  for (Case& c : cases) {
    right &= c.decode();
    right &= c.naive_decode();
  }
  for (int parts : {1, 2, 8}) right &= Case(cut, device_schedule(parts)).invariant_decode();
  right &= Case(row_tiles, device_schedule(4)).invariant_decode();
  right &= Case(kv_heads, device_schedule(4)).invariant_decode();
  right &= Case(small_pages, device_schedule(3)).invariant_decode();
  right &= Case(ragged, device_schedule(8)).decode();
  right &= Case(ragged_row_tiles, device_schedule(4)).decode();
  right &= Case(ragged_small_pages, device_schedule(3)).decode();
  right &= Case(ragged_kv_heads, device_schedule(4)).decode();
  right &= Case(cut, device_schedule(8)).checked_decode();
  right &= Case(many, device_schedule(3)).checked_decode();
  right &= Case(small_pages, device_schedule(3)).checked_decode();
  return right ? 0 : 1;
}
