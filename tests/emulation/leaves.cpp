// Runs the decode kernel's walk over leaves on the CPU, case after case from stdin: pages,
// max_leaves. Prints a line per case: where each leaf ends, then in which order they are merged.
#include <cstdio>
#include <string>
#include <vector>

#include "cuda_threads.h"
// after the emulated CUDA names
#include "sm90/leaves.cuh"

int main() {
  int pages, max_leaves;
  while (std::scanf("%d %d", &pages, &max_leaves) == 2) {
    std::vector<std::string> rooms(flashmla::subtree_rooms(max_leaves));
    std::string subtree;
    for (int page = 0, number = 0; page < pages; ++number) {
      // A room that does not exist ends the program.
      if (number > 0) rooms.at(flashmla::room_of(number - 1)) = subtree;
      page = flashmla::leaf_end(pages, page, max_leaves);
      std::printf("%d ", page);
      subtree = std::to_string(number);
      for (int i = 0; i < flashmla::siblings_of(number); ++i)
        subtree = "(" + rooms.at(i) + "+" + subtree + ")";
    }
    std::printf("%s\n", subtree.c_str());
  }
}
