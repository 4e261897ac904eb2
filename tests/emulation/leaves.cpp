// Runs the decode kernel's walk over leaves on the CPU, case after case from stdin: pages,
// max_leaves. Prints a line per case: where each leaf ends, then in which order they are added up.
#include <cstdio>
#include <string>

#include "cuda_threads.h"
// after the emulated CUDA names
#include "sm90/leaves.cuh"

int main() {
  int pages, max_leaves;
  while (std::scanf("%d %d", &pages, &max_leaves) == 2) {
    std::string rooms[2], result;
    for (int page = 0, number = 0; page < pages; ++number) {
      const flashmla::LeafPlace place(page, 0, pages, max_leaves);
      page = flashmla::leaf_end(pages, page, max_leaves);
      std::printf("%d ", page);
      const auto add = [&](int half) { result = "(" + rooms[half] + "+" + result + ")"; };
      result = std::to_string(number);
      if (!place.opens) add(place.half);
      if (page < pages) {
        rooms[place.half] = result;
      } else if (place.half == 1) {
        add(0);
      }
    }
    std::printf("%s\n", result.c_str());
  }
}
