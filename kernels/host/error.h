// How host code reports a failure: `return fail(STATUS, "sentence")`.
#pragma once

#include "flashmla/status.h"

namespace flashmla {

// Keeps the sentence for flashmla_last_error() and returns `status`. `format` is printf's.
[[gnu::format(printf, 2, 3)]] flashmla_status fail(flashmla_status status, const char* format, ...);

}  // namespace flashmla
