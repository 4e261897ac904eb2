// Device query and probe with no Python in sight. Exit code: 0 every device runs this build, 1 one
// does not, 2 no device.
#include <cstdio>

#include "flashmla/build_info.h"
#include "flashmla/device.h"

int main() {
  const flashmla_build_info build = flashmla_get_build_info();
  std::printf("flashmla %s, CUDA %s, %s, CUTLASS %s, %s\n", build.version, build.cuda_version,
              build.arch, build.cutlass_version, build.compiler);

  int count = 0;
  if (flashmla_device_count(&count) != FLASHMLA_OK) {
    std::printf("%s\n", flashmla_last_error());
    return 1;
  }
  if (count == 0) {
    std::printf("no CUDA device\n");
    return 2;
  }
  int exit_code = 0;
  for (int index = 0; index < count; ++index) {
    flashmla_device device;
    if (flashmla_device_query(index, &device) != FLASHMLA_OK ||
        flashmla_probe(index) != FLASHMLA_OK) {
      std::printf("%s\n", flashmla_last_error());
      exit_code = 1;
      continue;
    }
    std::printf("device %d: %s, compute capability %d.%d, %d SMs: probe passed\n", index,
                device.name, device.compute_major, device.compute_minor, device.sm_count);
  }
  return exit_code;
}
