// The check mode: page ids and lengths are looked at once a step, and in every layer whether the
// plan is that of the lengths. A request at fault is answered as if it were empty (out 0, lse
// -inf), the others as ever; the first fault is left for the host, which need not wait to see it.
#pragma once

#include <stdint.h>

#include "flashmla/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum flashmla_fault_kind {
  FLASHMLA_FAULT_NONE = 0,
  FLASHMLA_FAULT_PAGE = 1,    // a table entry that is no page of the cache
  FLASHMLA_FAULT_LENGTH = 2,  // negative, or more than a row of the table holds
  FLASHMLA_FAULT_PLAN = 3,    // a layer found lengths of more or fewer pages than were planned
} flashmla_fault_kind;

// In host memory that the device may write. Kernels fill it only while `kind` is NONE, and write
// `kind` last; the host reads it and sets it back to NONE.
typedef struct flashmla_fault {
  int32_t kind;
  int32_t request;
  int32_t column;    // of the table, for a PAGE; tokens of a page, 64 at most, for a PLAN
  int32_t value;     // the table entry, or the length
  int32_t accepted;  // pages of the cache, most tokens of a request, or tokens when it was planned
} flashmla_fault;

// In device memory; plans may share one.
typedef struct flashmla_fault_box {
  uint64_t lock;          // 0
  flashmla_fault* fault;  // as the device addresses it
} flashmla_fault_box;

typedef struct flashmla_bounds_params {
  int batch;
  int page_size;  // tokens
  int num_pages;  // of the cache

  const int32_t* seq_lens;     // [B]
  const int32_t* block_table;  // [B, block_table_stride], of which table_width columns may be read
  int64_t block_table_stride;
  int table_width;

  int32_t* planned_lens;  // [B], written: the length, or -1 for a request at fault
  flashmla_fault_box* faults;

  void* stream;  // cudaStream_t
} flashmla_bounds_params;

// Enqueues one kernel on the current device; a schedule of planned_lens then skips the requests at
// fault. Errors: INVALID_ARGUMENT, UNSUPPORTED_DEVICE, CUDA_ERROR.
flashmla_status flashmla_check_bounds(const flashmla_bounds_params* params);

#ifdef __cplusplus
}
#endif
