// Checks of what a caller passes through the C ABI; they need no GPU.
#pragma once

#include "flashmla/bounds.h"
#include "flashmla/decode.h"
#include "flashmla/schedule.h"

namespace flashmla {

// OK, or INVALID_ARGUMENT with a sentence that names the argument, what it was and what is
// accepted.
flashmla_status validate(const flashmla_bounds_params& params);
flashmla_status validate(const flashmla_decode_params& params);
flashmla_status validate(const flashmla_schedule_params& params);

}  // namespace flashmla
