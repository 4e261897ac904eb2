// What keeps the assembler from moving instructions.
#pragma once

namespace flashmla::ptx {

// What follows in the source also follows in the machine's code: the assembler moves nothing over a
// branch, but over a product or a wait whatever it does not need. This one is never taken, which
// only the caller knows: `count` is not negative. `place` tells those apart that follow one
// another.
__device__ __forceinline__ void keep_order(int count, int place) {
  if (count == -1 - place) asm volatile("trap;");
}

// In a branch that is never taken: the pointer is then worked out before that branch at the latest.
__device__ __forceinline__ void use_pointer(const void* pointer) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
}

}  // namespace flashmla::ptx
