// Absorbed multi-head latent attention over a paged latent cache, one decode step of one layer.
//
// q [B, S_q, H_q, 512 + 64], cache [P, page_size, H_kv, 576] with V its first 512 columns, out [B,
// S_q, H_q, 512]. Query row r of a KV head is query token r / group, head r % group, group = H_q /
// H_kv.
#pragma once

#include <stdint.h>

#include "flashmla/bounds.h"
#include "flashmla/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum flashmla_dtype {
  FLASHMLA_BF16 = 0,
  FLASHMLA_FP16 = 1,
} flashmla_dtype;

// One part of q; strides in elements, multiples of 8 from 0 up, less than 2^39; columns contiguous.
typedef struct flashmla_query {
  const void* data;
  int64_t batch_stride, token_stride, head_stride;
} flashmla_query;

typedef struct flashmla_decode_params {
  int dtype;  // a flashmla_dtype; any number may come in, which an enum could not hold
  int batch, s_q, h_q, h_kv;  // h_kv up to 65535 divides h_q; batch * s_q * h_q fits an int
  int page_size;              // 16, 32 or a multiple of 64
  int num_pages;
  int num_parts;        // 1 .. 65535
  int causal;           // bottom-right mask: query i sees tokens up to len - s_q + i
  int max_leaves;       // batch-invariant mode: as the schedule was told; 0: off
  float softmax_scale;  // > 0

  // q_latent, q_rope, kv, out are 16-byte aligned, partial_out 128-byte. With a batch of 0 no
  // pointer and no stride is looked at.
  flashmla_query q_latent;  // columns 0 .. 511 of q
  flashmla_query q_rope;    // columns 512 .. 575; the two may lie anywhere
  const void* kv;
  int64_t kv_page_stride, kv_row_stride,
      kv_head_stride;  // in elements, multiples of 8 from 8 up, less than 2^39; columns contiguous

  const int32_t* seq_lens;     // [B]
  const int32_t* block_table;  // [B, block_table_stride]
  int64_t block_table_stride;  // 0 or more

  const int32_t* items;          // [>= num_parts, 4] request, page_begin, page_end, split; 16-byte
                                 // aligned
  const int32_t* part_offsets;   // [num_parts + 1]
  const int32_t* split_offsets;  // [B + 1]

  // [B + 1] where requests differ in their query tokens: those of request b are tokens
  // query_offsets[b] .. query_offsets[b + 1] - 1, at least one and at most s_q, of q [T, H_q, 576],
  // out [T, H_q, 512] and lse [T, H_q], without batch strides. Not in batch-invariant mode, nor
  // with planned_lens. Null: s_q each.
  const int32_t* query_offsets;

  const int32_t* planned_lens;  // [B] of flashmla_check_bounds; null: lengths are not checked
  flashmla_fault_box* faults;   // null only with planned_lens

  void* out;          // [B, S_q, H_q, 512] contiguous
  float* lse;         // [B, S_q, H_q]
  void* partial_out;  // [splits, H_kv, rows, 512] fp16, columns in an order of the kernels' own
  // [splits, H_kv, rows, 8 bytes, in batch-invariant mode 16] what belongs to a row of it; 8-byte
  // aligned
  void* partial_lse;
  // Batch-invariant mode, 128-byte aligned: for each thread block of the decode kernel
  // log2(max_leaves) rooms for results that wait, of FLASHMLA_ROOM_FLOATS_OF_16_ROWS for every 16
  // rows each, no fewer than 32; none with a single leaf.
  float* rooms;

  void* stream;  // cudaStream_t
} flashmla_decode_params;

// One such room: results of the rows of one thread block, in sixteens: fp16 values, and for every
// lane of the warps that hold halves of them 8 bytes of state for each row it has.
enum { FLASHMLA_ROOM_FLOATS_OF_16_ROWS = 4352 };

// Enqueues the decode and the combine kernel on the current device.
// Errors: INVALID_ARGUMENT, UNSUPPORTED_DEVICE, CUDA_ERROR.
flashmla_status flashmla_decode(const flashmla_decode_params* params);

#ifdef __cplusplus
}
#endif
