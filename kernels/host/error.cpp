#include "host/error.h"

#include <cstdarg>
#include <cstdio>

namespace flashmla {
namespace {

thread_local char last_error[1024] = "";

}  // namespace

flashmla_status fail(flashmla_status status, const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof(last_error), format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace flashmla

const char* flashmla_last_error() { return flashmla::last_error; }
