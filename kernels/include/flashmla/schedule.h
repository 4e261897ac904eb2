// The tile scheduler: turns the lengths of one decode step into work lists. flashmla_backend/
// schedule.py specifies it; the device gives the same result, element for element.
#pragma once

#include <stdint.h>

#include "flashmla/status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
  FLASHMLA_SCHEDULE_MAX_ROUNDS = 6,  // pieces per part, if anything is cut
  FLASHMLA_SCHEDULE_MAX_BATCH = 8192,
  FLASHMLA_SCHEDULE_MAX_PARTS = 512,
  FLASHMLA_MAX_LEAVES = 128,  // of a request, in batch-invariant mode
};

// Predicted nanoseconds, each 1 .. 65535; only their ratios steer the schedule.
typedef struct flashmla_cost_model {
  int page;        // one 64-token page, in a part that need not wait for memory
  int item;        // prologue and epilogue of one work item
  int empty_item;  // a request without tokens; less than item + page
  int memory;      // reading one page, when all parts share the memory
  int reduction;   // launching the combine ...
  int partial;     // ... and storing and reading back each partial result
} flashmla_cost_model;

typedef struct flashmla_schedule_params {
  int batch;
  int num_parts;
  int max_leaves;  // batch-invariant mode: cut only into subtrees of at most so many leaves, a
                   // power of two; 0: cut anywhere
  flashmla_cost_model cost;
  const int32_t* seq_lens;  // [batch]; a negative length counts as 0

  // [max(batch, MAX_ROUNDS * num_parts), 4] request, page_begin, page_end, split (-1: uncut), part
  // after part; unused rows are -1; 16-byte aligned
  int32_t* items;
  int32_t* part_offsets;   // [num_parts + 1] into items
  int32_t* split_offsets;  // [batch + 1] into the partial results

  void* stream;  // cudaStream_t
} flashmla_schedule_params;

// Enqueues one kernel on the current device. Errors: INVALID_ARGUMENT, UNSUPPORTED_DEVICE,
// CUDA_ERROR.
flashmla_status flashmla_schedule(const flashmla_schedule_params* params);

#ifdef __cplusplus
}
#endif
