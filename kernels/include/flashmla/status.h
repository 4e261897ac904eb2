// Status codes of the C ABI, and the words that go with them.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

typedef enum flashmla_status {
  FLASHMLA_OK = 0,
  FLASHMLA_INVALID_ARGUMENT = 1,    // the caller passed something outside the documented range
  FLASHMLA_UNSUPPORTED_DEVICE = 2,  // the GPU cannot run the code in this build
  FLASHMLA_DRIVER_TOO_OLD = 3,      // a driver is there, but older than this build's CUDA runtime
  FLASHMLA_CUDA_ERROR = 4,          // the CUDA runtime reported an error
} flashmla_status;

// What went wrong in the last call on this thread that did not return FLASHMLA_OK: a sentence that
// names the argument or the device. Empty before the first failure. Valid until the next failure on
// the same thread.
const char* flashmla_last_error(void);

#ifdef __cplusplus
}
#endif
