// Runs the decode kernel's walk over the leaves of an item on the CPU, case after case from stdin:
// pages of the request, max_leaves, first page and end of the item. Prints a line per case: where
// each leaf ends, then in which order they are merged, each by its first page.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "cuda_threads.h"
// after the emulated CUDA names
#include "sm90/leaves.cuh"

int main() {
  int pages, max_leaves, begin, item_end;
  while (std::scanf("%d %d %d %d", &pages, &max_leaves, &begin, &item_end) == 4) {
    std::vector<std::string> rooms(__ffs(max_leaves) - 1);  // one for each level below the root
    std::string result;
    flashmla::LeafCursor cursor(pages, begin, max_leaves);
    for (int page = begin; page < item_end; cursor.advance()) {
      const int leaf = cursor.leaf(), end = std::min(item_end, cursor.end(pages));
      std::printf("%d ", end);
      result = std::to_string(page);
      page = end;
      const bool last = page == item_end;
      const uint32_t merged = flashmla::merged_subtrees(leaf, last);
      for (int level = 0; merged >> level > 0; ++level) {
        if ((merged >> level & 1) == 0) continue;
        result = "(" + rooms.at(level) + "+" + result + ")";
        rooms.at(level) = "taken";
      }
      if (!last) rooms.at(flashmla::waiting_subtree(leaf)) = result;
    }
    std::printf("%s\n", result.c_str());
  }
}
