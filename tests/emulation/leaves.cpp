// Runs the decode kernel's walk over leaves on the CPU, case after case from stdin: pages,
// max_leaves. Prints a line per case: where each leaf ends, then in which order they are added up.
#include <cstdio>
#include <string>
#include <vector>

#include "cuda_threads.h"
// after the emulated CUDA names
#include "sm90/leaves.cuh"

int main() {
  int pages, max_leaves;
  while (std::scanf("%d %d", &pages, &max_leaves) == 2) {
    std::vector<std::string> rooms(flashmla::room_count(max_leaves));
    std::string result;
    const int log_group = flashmla::log_group_leaves(pages, max_leaves);
    for (int page = 0, number = 0; page < pages; ++number) {
      page = flashmla::leaf_end(pages, page, max_leaves);
      std::printf("%d ", page);
      const bool final = page == pages;
      const flashmla::LeafPlace place(number, log_group, final);
      // A room that does not exist ends the program.
      const auto add = [&](int room) { result = "(" + rooms.at(room) + "+" + result + ")"; };
      result = std::to_string(number);
      if (!place.opens) add(place.room);
      if (place.stays) {
        rooms.at(place.room) = result;
        continue;
      }
      for (int i = 0; i < place.subtrees; ++i) add(1 + i);
      if (!final) rooms.at(place.next_room) = result;
    }
    std::printf("%s\n", result.c_str());
  }
}
