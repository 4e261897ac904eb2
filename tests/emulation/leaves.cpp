// Runs the decode kernel's walk over leaves on the CPU, case after case from stdin: pages,
// max_leaves. Prints a line per case: where each leaf ends.
#include <cstdio>

#include "cuda_threads.h"
// after the emulated CUDA names
#include "sm90/leaves.cuh"

int main() {
  int pages, max_leaves;
  while (std::scanf("%d %d", &pages, &max_leaves) == 2) {
    for (int page = 0; page < pages;) {
      page = flashmla::leaf_end(pages, page, max_leaves);
      std::printf("%d ", page);
    }
    std::printf("\n");
  }
}
