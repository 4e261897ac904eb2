// The CUDA devices of this machine, and whether this build runs on them.
//
// The first call initialises the CUDA driver in the calling process; CUDA does not work in a child
// forked after that.
#pragma once

#include <stdint.h>

#include "flashmla/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flashmla_device {
  char name[256];
  int compute_major;  // compute capability, 9.0 for Hopper
  int compute_minor;
  int sm_count;
  uint64_t memory_bytes;
  uint64_t l2_bytes;
  int driver_cuda_version;  // newest CUDA that the driver serves, 1000 * major + 10 * minor
} flashmla_device;

// Number of visible devices. No GPU, no driver and an empty CUDA_VISIBLE_DEVICES are not errors:
// *count = 0. Errors: DRIVER_TOO_OLD, CUDA_ERROR.
flashmla_status flashmla_device_count(int* count);

// Fills *device for the visible device `index`.
// Errors: INVALID_ARGUMENT (index out of range), DRIVER_TOO_OLD, CUDA_ERROR.
flashmla_status flashmla_device_query(int index, flashmla_device* device);

// Runs a small kernel on the visible device `index` and checks what it wrote: OK proves that this
// build's code runs there. Blocks until done; the calling thread's current device is the same
// before and after. Errors: INVALID_ARGUMENT, UNSUPPORTED_DEVICE, DRIVER_TOO_OLD, CUDA_ERROR.
flashmla_status flashmla_probe(int index);

#ifdef __cplusplus
}
#endif
