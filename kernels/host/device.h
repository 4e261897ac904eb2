// What the launchers ask of the current device.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "flashmla/status.h"

namespace flashmla {

// OK if the current device, whose index goes to *device, runs this build's code (sm_90a). Asks the
// driver once per device, so that a call costs next to nothing.
// Errors: UNSUPPORTED_DEVICE, DRIVER_TOO_OLD, CUDA_ERROR.
flashmla_status require_hopper(int* device);

// Lets `kernel` use `bytes` of dynamic shared memory on `device`; `done` remembers where that is
// so.
flashmla_status allow_shared_memory(const void* kernel, size_t bytes, int device,
                                    std::atomic<uint64_t>* done);

}  // namespace flashmla
