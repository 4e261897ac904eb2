// Launches the decode and the combine kernel.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <type_traits>

#include "flashmla/decode.h"
#include "host/device.h"
#include "host/error.h"
#include "host/validate.h"
#include "sm90/combine.cuh"
#include "sm90/combine_leaves.cuh"
#include "sm90/decode.cuh"
#include "sm90/few_rows/decode.cuh"
#include "sm90/launch.cuh"

namespace flashmla {
namespace {

// The cache as 64-column tiles: one box is a tile of 64 tokens in the layout that wgmma reads, or
// the rows of it that a smaller page fills.
// L2 fetches the 128 bytes of a box's row and no more: where it fetched 256, an H200's memory was
// read well below its rate.
flashmla_status make_kv_map(const flashmla_decode_params& p, int box_tokens, CUtensorMap* map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<Encode>(function)
               : nullptr;
  }();
  if (encode == nullptr)
    return fail(FLASHMLA_CUDA_ERROR, "the driver has no cuTensorMapEncodeTiled: update the driver");
  const auto rows = static_cast<cuuint64_t>(p.page_size), heads = static_cast<cuuint64_t>(p.h_kv),
             pages = static_cast<cuuint64_t>(p.num_pages);
  const auto bytes = [](int64_t elements) { return static_cast<cuuint64_t>(elements) * 2; };
  const cuuint64_t sizes[5] = {64, rows, kTiles, heads, pages};
  const cuuint64_t strides[4] = {bytes(p.kv_row_stride), bytes(64), bytes(p.kv_head_stride),
                                 bytes(p.kv_page_stride)};
  const cuuint32_t box[5] = {64, static_cast<cuuint32_t>(box_tokens), 1, 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUresult result = encode(
      map,
      p.dtype == FLASHMLA_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      5, const_cast<void*>(p.kv), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    return fail(FLASHMLA_CUDA_ERROR, "cuTensorMapEncodeTiled: error %d", result);
  return FLASHMLA_OK;
}

int row_tiles_of(const DecodeArguments& a) { return (a.rows + kTileRows - 1) / kTileRows; }

template <typename Element, bool kInvariant, bool kRagged>
cudaError_t launch_combine(const flashmla_decode_params& p, const DecodeArguments& arguments) {
  constexpr int kSms = 132, kWarps = kSms * kCombineWarps;
  const int64_t rows = int64_t{p.batch} * p.h_kv * arguments.rows;
  const auto run = [&](auto words, auto blocks_per_sm) {
    constexpr int kWords = decltype(words)::value, kBlocksPerSm = decltype(blocks_per_sm)::value;
    const dim3 grid(std::min<int64_t>(rows * Slices<kWords>::kCount, kSms * kBlocksPerSm));
    if constexpr (kInvariant) {
      return launch_dependent(combine_leaves_kernel<Element, kWords, kBlocksPerSm>, grid,
                              kCombineThreads, 0, p.stream, arguments);
    } else {
      return launch_dependent(combine_kernel<Element, kRagged, kWords, kBlocksPerSm>, grid,
                              kCombineThreads, 0, p.stream, arguments);
    }
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, 4> four;
  if (rows * Slices<1>::kCount <= kWarps) return run(one, one);
  if (rows * Slices<2>::kCount <= kWarps) return run(two, one);
  // With more slices than warps, each warp has several, and waits for one after the other; where
  // the root is not rounded two blocks would have too few registers.
  if constexpr (!(kInvariant && kUnroundedRoot<Element>)) {
    if (rows * Slices<4>::kCount > kWarps) return run(four, two);
  }
  return run(four, one);
}

// The decode kernel of at most kRows query rows, or of any number of tiles of 64.
template <typename Element, bool kInvariant, bool kRagged, int kRows, int kClusterSize>
constexpr auto kernel_of() {
  if constexpr (kRows == kFewRows) {
    return few_rows::decode_few_rows_kernel<Element, kRagged>;
  } else {
    constexpr int kThreadRows = kRows == kDealtRows ? 1 : 2;
    return decode_kernel<Element, kInvariant, kRagged, kThreadRows, kClusterSize>;
  }
}

template <typename Element, bool kInvariant, bool kRagged, int kRows, int kClusterSize>
flashmla_status launch(const flashmla_decode_params& p, const DecodeArguments& arguments,
                       int device) {
  constexpr size_t kSharedBytes =
      sizeof(DecodeShared) + 1024;  // the driver aligns to 16 bytes, wgmma tiles to 1,024
  static std::atomic<uint64_t> allowed{0};
  const auto decode = kernel_of<Element, kInvariant, kRagged, kRows, kClusterSize>();
  if (const flashmla_status status = allow_shared_memory(reinterpret_cast<const void*>(decode),
                                                         kSharedBytes, device, &allowed))
    return status;
  const dim3 grid(row_tiles_of(arguments), p.h_kv, p.num_parts);
  cudaError_t error =
      launch_dependent(decode, grid, kThreads, kSharedBytes, p.stream, arguments, kClusterSize);
  if (error != cudaSuccess)
    return fail(FLASHMLA_CUDA_ERROR, "decode launch: %s", cudaGetErrorString(error));
  error = launch_combine<Element, kInvariant, kRagged>(p, arguments);
  if (error != cudaSuccess)
    return fail(FLASHMLA_CUDA_ERROR, "combine launch: %s", cudaGetErrorString(error));
  if (arguments.planned_lens == nullptr || arguments.box_log2 == kTileLog2) return FLASHMLA_OK;
  error = launch_dependent(empty_stale_kernel<Element>, dim3(p.batch), kEmptyThreads, 0, p.stream,
                           arguments);
  if (error != cudaSuccess)
    return fail(FLASHMLA_CUDA_ERROR, "empty launch: %s", cudaGetErrorString(error));
  return FLASHMLA_OK;
}

}  // namespace
}  // namespace flashmla

flashmla_status flashmla_decode(const flashmla_decode_params* params) {
  using namespace flashmla;
  const flashmla_decode_params& p = *params;
  if (const flashmla_status status = validate(p)) return status;
  int device = 0;
  if (const flashmla_status status = require_hopper(&device)) return status;
  if (p.batch == 0) return FLASHMLA_OK;
  DecodeArguments arguments{};
  arguments.box_log2 = p.page_size == 16 ? 4 : p.page_size == 32 ? 5 : kTileLog2;
  if (const flashmla_status status = make_kv_map(p, 1 << arguments.box_log2, &arguments.kv_map))
    return status;
  arguments.q_latent = p.q_latent;
  arguments.q_rope = p.q_rope;
  arguments.seq_lens = p.seq_lens;
  arguments.block_table = p.block_table;
  arguments.block_table_stride = p.block_table_stride;
  arguments.items = reinterpret_cast<const int4*>(p.items);
  arguments.part_offsets = p.part_offsets;
  arguments.split_offsets = p.split_offsets;
  arguments.query_offsets = p.query_offsets;
  arguments.planned_lens = p.planned_lens;
  arguments.faults = p.faults;
  arguments.out = p.out;
  arguments.lse = p.lse;
  arguments.partial_out = static_cast<__half*>(p.partial_out);
  arguments.partial_lse = static_cast<PartialState*>(p.partial_lse);
  arguments.rooms = reinterpret_cast<uint8_t*>(p.rooms);
  arguments.batch = p.batch;
  arguments.s_q = p.s_q;
  arguments.h_q = p.h_q;
  arguments.h_kv = p.h_kv;
  arguments.rows = p.s_q * (p.h_q / p.h_kv);
  arguments.group = Divisor(p.h_q / p.h_kv);
  arguments.head_rows = Divisor(arguments.rows);
  arguments.all_rows = Divisor(p.h_kv * arguments.rows);
  arguments.tiles_per_page = Divisor(std::max(1, p.page_size / kTileTokens));
  arguments.max_leaves = p.max_leaves;
  arguments.causal = p.causal != 0;
  arguments.scale_log2 = p.softmax_scale * kLog2E;
  const auto launch_as = [&](auto invariant, auto ragged, auto rows, auto cluster_size) {
    constexpr bool kInvariant = decltype(invariant)::value, kRagged = decltype(ragged)::value;
    constexpr int kRows = decltype(rows)::value, kClusterSize = decltype(cluster_size)::value;
    return p.dtype == FLASHMLA_BF16
               ? launch<__nv_bfloat16, kInvariant, kRagged, kRows, kClusterSize>(p, arguments,
                                                                                 device)
               : launch<__half, kInvariant, kRagged, kRows, kClusterSize>(p, arguments, device);
  };
  const auto launch_mode = [&](auto invariant, auto ragged) {
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, 2> two;
    constexpr std::integral_constant<int, kFewRows> few;
    constexpr std::integral_constant<int, kDealtRows> dealt;
    constexpr std::integral_constant<int, kTileRows> many;
    if constexpr (!decltype(invariant)::value) {
      if (has_few_rows(arguments.rows)) return launch_as(invariant, ragged, few, one);
    }
    if (arguments.rows <= dealt) return launch_as(invariant, ragged, dealt, one);
    return row_tiles_of(arguments) % 2 == 0 ? launch_as(invariant, ragged, many, two)
                                            : launch_as(invariant, ragged, many, one);
  };
  if (p.query_offsets != nullptr) return launch_mode(std::false_type{}, std::true_type{});
  return p.max_leaves == 0 ? launch_mode(std::false_type{}, std::false_type{})
                           : launch_mode(std::true_type{}, std::false_type{});
}
