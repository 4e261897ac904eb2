// The FLASHMLA_* macros come from kernels/CMakeLists.txt.
#include "flashmla/build_info.h"

#include <cutlass/version.h>

#define FLASHMLA_TEXT_(x) #x
#define FLASHMLA_TEXT(x) FLASHMLA_TEXT_(x)
#define FLASHMLA_CUTLASS_VERSION \
  FLASHMLA_TEXT(CUTLASS_MAJOR) "." FLASHMLA_TEXT(CUTLASS_MINOR) "." FLASHMLA_TEXT(CUTLASS_PATCH)

flashmla_build_info flashmla_get_build_info() {
  flashmla_build_info info{};
  info.version = FLASHMLA_VERSION;
  info.cuda_version = FLASHMLA_CUDA_VERSION;
  info.arch = FLASHMLA_ARCH;
  info.cutlass_version = FLASHMLA_CUTLASS_VERSION;
  info.compiler = FLASHMLA_COMPILER;
  return info;
}
