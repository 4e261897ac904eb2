// The tile scheduler of flashmla_backend/schedule.py as the work of thread blocks: each block
// proposes the schedule of one candidate, the cheapest proposal is published.
//
// Nothing here but integer arithmetic, __syncthreads and warp intrinsics, so that a host program
// can emulate a block (tests/emulation).
#pragma once

#include <cstddef>
#include <cstdint>

#include "flashmla/schedule.h"
#include "sm90/leaves.cuh"

namespace flashmla::schedule {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
// Ranks: no cut; up to kRounds so many pieces a part; up to six a cap of so many quarters of a
// part's mean; level. In batch-invariant mode, and where a batch is too large for the last two, up
// to six pieces a part.
constexpr int kRounds = 3, kLevel = FLASHMLA_SCHEDULE_MAX_ROUNDS + 1;
constexpr int kCandidates = kLevel + 1;
constexpr int kMaxParts = FLASHMLA_SCHEDULE_MAX_PARTS;
constexpr int kPageTokens = 64;
constexpr int kDigits = 256;  // of the radix sort
constexpr int64_t kNoProposal = INT64_MAX;
constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kWarps == 32, "block-wide reductions give each lane one warp's value");

struct Arguments {
  const int32_t* seq_lens;
  int batch, parts, max_items;
  int max_leaves;  // 0: pieces may be cut anywhere
  flashmla_cost_model cost;
  int4* items;
  int32_t* part_offsets;
  int32_t* split_offsets;
};

// Of the level candidate: where the line of requests is cut at the begin of each part.
struct Boundaries {
  int64_t position[kMaxParts + 1];
  int request[kMaxParts + 1];
  int cut_page[kMaxParts + 1];  // of the boundaries inside a request, in order
};

// The part of shared memory whose size is fixed; Workspace adds the rest.
struct FixedShared {
  int64_t totals[kCandidates];  // predicted cost by block rank
  int64_t wide_values[kWarps];
  int64_t load_keys[2][kMaxParts];  // load << 9 | part
  int values[2][kWarps];
  union {
    int digit_offsets[kDigits][kWarps + 1];  // odd stride: digits fall into different banks
    Boundaries boundaries;
  };
  int part_items[kMaxParts];
  int part_first[kMaxParts + 1];
};
static_assert(kMaxParts <= 1 << 9, "load_keys");

struct Workspace {
  FixedShared* fixed;
  int* pages;            // [batch]
  int* first_piece;      // [batch + 1] pieces are numbered request by request
  int* split_first;      // [batch + 1]
  int* piece_pages;      // [max_items]
  uint16_t* order[2];    // [max_items] pieces, costliest first
  uint16_t* piece_part;  // [max_items] by position in that order
  int64_t* starts;       // [batch + 1] of the level candidate, in the place of the last four

  __device__ Workspace(uint8_t* raw, int batch, int max_items)
      : fixed(reinterpret_cast<FixedShared*>(raw)),
        pages(reinterpret_cast<int*>(fixed + 1)),
        first_piece(pages + batch),
        split_first(first_piece + batch + 1),
        piece_pages(split_first + batch + 1),
        order{reinterpret_cast<uint16_t*>(piece_pages + max_items), order[0] + max_items},
        piece_part(order[1] + max_items),
        starts(reinterpret_cast<int64_t*>(piece_pages + (batch % 2 == 0 ? 0 : 1))) {}

  static constexpr size_t bytes(int batch, int max_items) {
    return sizeof(FixedShared) + sizeof(int) * (3 * static_cast<size_t>(batch) + 2 + max_items) +
           sizeof(uint16_t) * 3 * static_cast<size_t>(max_items);
  }
};

struct Range {
  int begin, end;
};

// Piece `number` of `count` near-equal ones: pages * number / count, without a product that
// overflows.
__device__ __forceinline__ Range piece_range(int pages, int number, int count) {
  const int quotient = pages / count, remainder = pages % count;
  return {quotient * number + remainder * number / count,
          quotient * (number + 1) + remainder * (number + 1) / count};
}

__device__ __forceinline__ int piece_count(int pages, int cap, int max_leaves) {
  const int count = pages == 0 ? 1 : (pages + cap - 1) / cap;
  if (max_leaves == 0 || count == 1) return count;
  // Subtrees: near-equal pieces of a power of two are whole leaves.
  const int power = 1 << (32 - __clz(count - 1)), leaves = leaf_count(pages, max_leaves);
  return power < leaves ? power : leaves;
}

// One per thread; every method is called by the whole block.
class Scheduler {
 public:
  __device__ Scheduler(const Arguments& a, const Workspace& w)
      : a_(a), w_(w), thread_(threadIdx.x), lane_(threadIdx.x % 32), warp_(threadIdx.x / 32) {}

  // Works out the schedule of candidate `rank`. Returns its predicted cost, kNoProposal if it
  // cannot be. The lowest rank of equal cost is the specification's choice.
  __device__ int64_t propose(int rank) {
    level_ = rank == kLevel;
    if (level_) return propose_level();
    const bool by_mean = rank > kRounds && a_.max_leaves == 0 && has_room_for_cuts();
    const int limit = rank * a_.parts;
    if (!by_mean && rank > 0 && a_.batch > limit) return kNoProposal;
    const int longest = read_pages();
    const int cap = by_mean     ? cap_by_mean(rank, longest)
                    : rank == 0 ? longest
                                : smallest_cap(limit, longest);
    cut(cap);
    // Subtrees have no more pages than the longest request, free pieces no more than the cap.
    const int most = a_.max_leaves == 0 ? cap : longest;
    sort(most);
    return total_cost(deal());
  }

  // Writes the proposed schedule out.
  __device__ void publish() {
    if (!level_)
      fill_offsets(w_.fixed->part_first, a_.parts,
                   [&](int part) { return w_.fixed->part_items[part]; });
    fill_offsets(w_.split_first, a_.batch, [&](int request) {
      const int count = w_.first_piece[request + 1] - w_.first_piece[request];
      return count > 1 ? count : 0;
    });
    for (int i = thread_; i <= a_.parts; i += kThreads)
      a_.part_offsets[i] = w_.fixed->part_first[i];
    for (int i = thread_; i <= a_.batch; i += kThreads) a_.split_offsets[i] = w_.split_first[i];
    for (int i = thread_; i < pieces_; i += kThreads) {
      const int piece = level_ ? i : order_[i], request = request_of(piece);
      const int first = w_.first_piece[request], count = w_.first_piece[request + 1] - first;
      const Range range = level_ ? level_range(request, piece)
                                 : piece_range(w_.pages[request], piece - first, count);
      const int split = count > 1 ? w_.split_first[request] + piece - first : -1;
      a_.items[level_ ? i : w_.fixed->part_first[w_.piece_part[i]] + i / a_.parts] =
          make_int4(request, range.begin, range.end, split);
    }
    for (int i = pieces_ + thread_; i < a_.max_items; i += kThreads)
      a_.items[i] = make_int4(-1, -1, -1, -1);
  }

 private:
  // Pages of every request; returns the most, at least 1.
  __device__ int read_pages() {
    int longest = 1;
    for (int i = thread_; i < a_.batch; i += kThreads) {
      const int tokens = a_.seq_lens[i];
      const int pages = tokens > 0 ? (tokens - 1) / kPageTokens + 1 : 0;
      w_.pages[i] = pages;
      longest = pages > longest ? pages : longest;
    }
    longest = __reduce_max_sync(kAllLanes, longest);
    int* values = exchange(longest, lane_ == 0);
    return __reduce_max_sync(kAllLanes, values[lane_]);
  }

  __device__ int smallest_cap(int limit, int longest) {
    int low = 1, high = longest;
    while (low < high) {  // the number of pieces falls as the cap grows
      const int middle = (low + high) / 2;
      int pieces = 0;
      for (int i = thread_; i < a_.batch; i += kThreads) {
        const int count = piece_count(w_.pages[i], middle, a_.max_leaves);
        pieces += count <= limit ? count : limit + 1;  // enough to be too many, never an overflow
      }
      pieces = __reduce_add_sync(kAllLanes, pieces);
      int* values = exchange(pieces, lane_ == 0);
      if (__reduce_add_sync(kAllLanes, values[lane_]) <= limit) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  // A part's mean of pages times quarters / 4, rounded up.
  __device__ int cap_by_mean(int quarters, int longest) {
    int64_t pages = 0;
    for (int i = thread_; i < a_.batch; i += kThreads) pages += w_.pages[i];
    const int64_t parts = 4 * a_.parts, cap = (block_sum(pages) * quarters + parts - 1) / parts;
    return cap < 1 ? 1 : cap < longest ? static_cast<int>(cap) : longest;
  }

  // For as many more pieces as there are parts.
  __device__ bool has_room_for_cuts() const {
    return a_.batch + a_.parts <= FLASHMLA_SCHEDULE_MAX_ROUNDS * a_.parts;
  }

  __device__ void cut(int cap) {
    pieces_ = fill_offsets(w_.first_piece, a_.batch, [&](int request) {
      return piece_count(w_.pages[request], cap, a_.max_leaves);
    });
    for (int piece = thread_; piece < pieces_; piece += kThreads) {
      const int request = request_of(piece);
      const int first = w_.first_piece[request], count = w_.first_piece[request + 1] - first;
      const Range range = piece_range(w_.pages[request], piece - first, count);
      w_.piece_pages[piece] = range.end - range.begin;
      w_.order[0][piece] = static_cast<uint16_t>(piece);
    }
    __syncthreads();
  }

  // All requests end to end on a line of cost, cut wherever a part's equal share ends.
  __device__ int64_t propose_level() {
    if (a_.max_leaves > 0) return kNoProposal;  // its pieces are no leaves
    if (!has_room_for_cuts()) return kNoProposal;
    read_pages();
    const int64_t total = fill_starts(), share = (total + a_.parts - 1) / a_.parts;
    if (share < a_.cost.item + a_.cost.page) return kNoProposal;
    Boundaries& boundaries = w_.fixed->boundaries;
    // One boundary a thread. A piece that begins at the n-th cut has n cuts before it, and as many
    // whole requests as its own has predecessors: that numbers pieces along the line.
    const int part = thread_;
    int request = 0, page = 0;
    if (part > 0 && part <= a_.parts) cut_at(part * share, &request, &page);
    const int inside = page > 0;
    int cuts;
    const int before = exclusive_scan(inside, &cuts);
    if (part <= a_.parts) {
      boundaries.request[part] = request;
      boundaries.position[part] =
          w_.starts[request] +
          (inside ? a_.cost.item + static_cast<int64_t>(page) * a_.cost.page : 0);
      w_.fixed->part_first[part] = request + before + inside;
      if (inside) boundaries.cut_page[before] = page;
    }
    __syncthreads();
    pieces_ = fill_offsets(w_.first_piece, a_.batch, [&](int of) { return 1 + cuts_in(of); });
    // A part that begins inside a request pays for an item of its own.
    const int64_t load = part < a_.parts
                             ? boundaries.position[part + 1] - boundaries.position[part] +
                                   (inside ? a_.cost.item : 0)
                             : 0;
    return total_cost(load);
  }

  // Predicted cost of the proposal from the load of this thread's part, 0 if it has none: parts
  // that wait for memory finish nearly together, and partial results are merged.
  __device__ int64_t total_cost(int64_t load) {
    const int64_t most = block_max(load), mean = block_sum(load) / a_.parts;
    int partials = 0;
    int64_t pages = 0;
    for (int i = thread_; i < a_.batch; i += kThreads) {
      const int count = w_.first_piece[i + 1] - w_.first_piece[i];
      partials += count > 1 ? count : 0;
      pages += w_.pages[i];
    }
    const int64_t reading = block_sum(pages) * a_.cost.memory + (most - mean) / 2;
    const int64_t cost = reading > most ? reading : most;
    partials = __reduce_add_sync(kAllLanes, partials);
    const int* values = exchange(partials, lane_ == 0);
    partials = __reduce_add_sync(kAllLanes, values[lane_]);
    return partials == 0
               ? cost
               : cost + a_.cost.reduction + static_cast<int64_t>(partials) * a_.cost.partial;
  }

  // starts[i] = predicted cost of requests 0 .. i - 1; returns the last.
  __device__ int64_t fill_starts() {
    const int own = (a_.batch + kThreads - 1) / kThreads;
    const int first = thread_ * own < a_.batch ? thread_ * own : a_.batch;
    const int last = first + own < a_.batch ? first + own : a_.batch;
    int64_t sum = 0;
    for (int i = first; i < last; ++i) sum += cost_of(w_.pages[i]);
    int64_t inclusive = sum;
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(kAllLanes, inclusive, step);
      if (lane_ >= step) inclusive += other;
    }
    if (lane_ == 31) w_.fixed->wide_values[warp_] = inclusive;
    __syncthreads();
    int64_t before = 0, total = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      if (warp < warp_) before += w_.fixed->wide_values[warp];
      total += w_.fixed->wide_values[warp];
    }
    int64_t start = before + inclusive - sum;
    for (int i = first; i < last; ++i) {
      w_.starts[i] = start;
      start += cost_of(w_.pages[i]);
    }
    if (thread_ == 0) w_.starts[a_.batch] = total;
    __syncthreads();
    return total;
  }

  // The last page boundary at or before `position` of the line. The end of a request is the begin
  // of the next.
  __device__ void cut_at(int64_t position, int* request, int* page) const {
    *page = 0;
    *request = a_.batch;
    if (position >= w_.starts[a_.batch]) return;
    int low = 0, high = a_.batch;  // starts[low] <= position < starts[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (w_.starts[middle] <= position) {
        low = middle;
      } else {
        high = middle;
      }
    }
    *request = low;
    const int64_t inside = position - w_.starts[low] - a_.cost.item;
    *page = inside > 0 ? static_cast<int>(inside / a_.cost.page) : 0;
  }

  // Boundaries inside a request: those of it less the one at its begin, if there is one.
  __device__ int cuts_in(int request) const {
    const auto cuts_before = [&](int limit) {  // request[i] < limit for i < low
      int low = 0, high = a_.parts + 1;
      while (low < high) {
        const int middle = (low + high) / 2;
        if (w_.fixed->boundaries.request[middle] < limit) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      // part_first counts cuts and requests.
      return low == 0 ? 0 : w_.fixed->part_first[low - 1] - w_.fixed->boundaries.request[low - 1];
    };
    return cuts_before(request + 1) - cuts_before(request);
  }

  __device__ Range level_range(int request, int piece) const {
    const int cut = piece - request;  // cuts before the end of this piece
    return {piece == w_.first_piece[request] ? 0 : w_.fixed->boundaries.cut_page[cut - 1],
            piece + 1 == w_.first_piece[request + 1] ? w_.pages[request]
                                                     : w_.fixed->boundaries.cut_page[cut]};
  }

  __device__ __forceinline__ int64_t cost_of(int pages) const {
    return pages == 0 ? a_.cost.empty_item
                      : a_.cost.item + static_cast<int64_t>(pages) * a_.cost.page;
  }

  // Stable radix sort, most pages first: pieces of equal cost stay in order of request and number.
  __device__ void sort(int most_pages) {
    const uint16_t* from = w_.order[0];
    uint16_t* to = w_.order[1];
    for (int shift = 0; shift < 32 && most_pages >> shift > 0; shift += 8) {
      sort_by_digit(from, to, most_pages, shift);
      uint16_t* const sorted = to;
      to = const_cast<uint16_t*>(from);
      from = sorted;
    }
    order_ = from;
  }

  __device__ void sort_by_digit(const uint16_t* from, uint16_t* to, int most_pages, int shift) {
    auto& offsets = w_.fixed->digit_offsets;
    for (int i = thread_; i < kDigits * kWarps; i += kThreads) offsets[i / kWarps][i % kWarps] = 0;
    __syncthreads();
    // Each warp owns a run of pieces, 32 at a time.
    const int run = (pieces_ + kThreads - 1) / kThreads * 32;
    const int begin = warp_ * run;
    const auto for_each_group = [&](auto&& visit) {
      for (int i = begin + lane_; i < begin + run; i += 32) {
        const bool valid = i < pieces_;
        const int digit =
            valid ? (most_pages - w_.piece_pages[from[i]]) >> shift & (kDigits - 1) : kDigits;
        const unsigned peers = __match_any_sync(kAllLanes, digit);
        if (valid) visit(from[i], &offsets[digit][warp_], __popc(peers & ((1u << lane_) - 1)));
        __syncwarp();
        if (valid && lane_ == __ffs(peers) - 1) offsets[digit][warp_] += __popc(peers);
        __syncwarp();
      }
    };
    for_each_group([](int, const int*, int) {});  // count
    __syncthreads();

    // Exclusive scan, digit by digit and warp by warp within.
    constexpr int kOwn = kDigits * kWarps / kThreads;
    int counts[kOwn], sum = 0;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int i = thread_ * kOwn + j;
      counts[j] = offsets[i / kWarps][i % kWarps];
      sum += counts[j];
    }
    int total;
    int offset = exclusive_scan(sum, &total);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int i = thread_ * kOwn + j;
      offsets[i / kWarps][i % kWarps] = offset;
      offset += counts[j];
    }
    __syncthreads();
    for_each_group([&](int piece, const int* first, int rank) {
      to[*first + rank] = static_cast<uint16_t>(piece);
    });
    __syncthreads();
  }

  // Deals the sorted pieces in rounds, the costliest of a round to the least loaded part. Returns
  // the load of the part that this thread leads, 0 if it leads none.
  __device__ int64_t deal() {
    int lanes = 32;  // that share the ranking of one part
    while (lanes * a_.parts > kThreads) lanes /= 2;
    const int part = thread_ / lanes, slice = thread_ % lanes;
    const bool leads = part < a_.parts && slice == 0;
    int64_t load = 0;
    int rank = part;  // by (load, part)
    int items = 0, buffer = 0;
    if (leads) w_.fixed->load_keys[0][part] = part;
    for (int start = 0; start < pieces_; start += a_.parts, buffer ^= 1) {
      __syncthreads();
      // A round of equal pieces leaves the ranks as they are.
      if (start > 0 && pages_at(start - a_.parts) != pages_at(start - 1)) {
        const int64_t* keys = w_.fixed->load_keys[buffer];
        const int64_t own = part < a_.parts ? keys[part] : 0;
        rank = 0;
        for (int i = slice; i < a_.parts; i += lanes) rank += keys[i] < own;
        for (int step = 1; step < lanes; step *= 2) rank += __shfl_xor_sync(kAllLanes, rank, step);
      }
      if (!leads) continue;
      if (rank < a_.parts && start + rank < pieces_) {
        const int pages = pages_at(start + rank);
        w_.piece_part[start + rank] = static_cast<uint16_t>(part);
        load += cost_of(pages);
        ++items;
      }
      w_.fixed->load_keys[buffer ^ 1][part] = load << 9 | part;
    }
    if (leads) w_.fixed->part_items[part] = items;
    return load;
  }

  __device__ __forceinline__ int pages_at(int position) const {
    return w_.piece_pages[order_[position]];
  }

  __device__ __forceinline__ int request_of(int piece) const {
    int low = 0, high = a_.batch;  // first_piece[low] <= piece < first_piece[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (w_.first_piece[middle] <= piece) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // offsets[i] = sum of count(0) .. count(i - 1), for i = 0 .. n; returns the last.
  template <typename Count>
  __device__ int fill_offsets(int* offsets, int n, const Count& count) {
    const int own = (n + kThreads - 1) / kThreads;
    const int first = thread_ * own < n ? thread_ * own : n;
    const int last = first + own < n ? first + own : n;
    int sum = 0, total;
    for (int i = first; i < last; ++i) sum += count(i);
    int offset = exclusive_scan(sum, &total);
    for (int i = first; i < last; ++i) {
      offsets[i] = offset;
      offset += count(i);
    }
    if (thread_ == 0) offsets[n] = total;
    __syncthreads();
    return total;
  }

  __device__ int exclusive_scan(int value, int* total) {
    int inclusive = value;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, inclusive, step);
      if (lane_ >= step) inclusive += other;
    }
    const int of_warp = exchange(inclusive, lane_ == 31)[lane_];
    *total = __reduce_add_sync(kAllLanes, of_warp);
    return __reduce_add_sync(kAllLanes, lane_ < warp_ ? of_warp : 0) + inclusive - value;
  }

  // One value of every warp, from its lane that `contributes`. Buffers alternate, so that one
  // barrier keeps a fast warp from overwriting what a slow one still reads.
  __device__ int* exchange(int value, bool contributes) {
    int* values = w_.fixed->values[turn_];
    turn_ ^= 1;
    if (contributes) values[warp_] = value;
    __syncthreads();
    return values;
  }

  __device__ int64_t block_max(int64_t value) {
    value = warp_max(value);
    __syncthreads();  // earlier values have been read
    if (lane_ == 0) w_.fixed->wide_values[warp_] = value;
    __syncthreads();
    return warp_max(w_.fixed->wide_values[lane_]);
  }

  __device__ int64_t block_sum(int64_t value) {
    for (int step = 1; step < 32; step *= 2) value += __shfl_xor_sync(kAllLanes, value, step);
    __syncthreads();  // earlier values have been read
    if (lane_ == 0) w_.fixed->wide_values[warp_] = value;
    __syncthreads();
    int64_t sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += w_.fixed->wide_values[warp];
    return sum;
  }

  __device__ static int64_t warp_max(int64_t value) {
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_xor_sync(kAllLanes, value, step);
      value = other > value ? other : value;
    }
    return value;
  }

  const Arguments& a_;
  const Workspace& w_;
  const int thread_, lane_, warp_;
  bool level_ = false;
  int pieces_ = 0;
  const uint16_t* order_ = nullptr;
  int turn_ = 0;
};

// The rank whose proposal wins.
__device__ __forceinline__ int cheapest(const int64_t (&totals)[kCandidates]) {
  int best = 0;
  for (int rank = 1; rank < kCandidates; ++rank) {
    if (totals[rank] < totals[best]) best = rank;
  }
  return best;
}

}  // namespace flashmla::schedule
