// How this library was built.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flashmla_build_info {
  const char* version;          // "0.1.0"
  const char* cuda_version;     // toolkit, "13.0"
  const char* arch;             // the one architecture compiled for, "sm_90a"
  const char* cutlass_version;  // "4.2.0"
  const char* compiler;         // device and host compiler, "nvcc 13.0.88, GNU 12.2.0"
} flashmla_build_info;

// Never fails; the strings live as long as the library.
flashmla_build_info flashmla_get_build_info(void);

#ifdef __cplusplus
}
#endif
