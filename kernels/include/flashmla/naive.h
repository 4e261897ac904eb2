// The textbook form of flashmla_decode, to compare with: one thread block per request and query
// row, scores in shared memory, no tensor cores, no splits.
#pragma once

#include "flashmla/decode.h"

#ifdef __cplusplus
extern "C" {
#endif

// Enqueues one kernel. Reads no schedule and writes no partial results: items, part_offsets,
// split_offsets, partial_out and partial_lse may be null. Runs wherever the build does.
// Errors: INVALID_ARGUMENT, CUDA_ERROR.
flashmla_status flashmla_naive_decode(const flashmla_decode_params* params);

#ifdef __cplusplus
}
#endif
