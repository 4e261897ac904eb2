// One CUDA thread block on the CPU: every thread is a fiber that runs until its next barrier or
// warp intrinsic.
//
// A value read before a barrier that should have ordered it shows as a wrong result, since the
// order in which threads run is the caller's choice (`Order`); a barrier that not all threads reach
// ends the program.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __host__
#define __forceinline__ inline

struct int4 {
  int x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

namespace emulation {

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  int64_t values[32];
};

struct Fiber {
  ucontext_t start;
  jmp_buf position;
  bool started = false, done = false;
  std::unique_ptr<char[]> stack;
};

enum class Order { kAscending, kDescending };

class Block {
 public:
  explicit Block(unsigned threads) : fibers_(threads), warps_(threads / 32) {
    for (Fiber& fiber : fibers_) fiber.stack.reset(new char[kStackBytes]);
  }

  void run(const std::function<void()>& body, Order order) {
    body_ = &body;
    order_ = order;
    for (Fiber& fiber : fibers_) fiber.started = fiber.done = false;
    remaining_ = fibers_.size();
    idle_switches_ = 0;
    idle_in_warp_ = 0;
    current_ = order == Order::kAscending ? 31 : fibers_.size() - 1;
    // A fiber jumps here when it waits. A warp runs on until all its lanes wait for other warps,
    // which is the order that a missing barrier survives least; a round of warps in which none got
    // on is a deadlock.
    setjmp(scheduler_);
    if (remaining_ == 0) return;
    if (idle_switches_++ > 2 * 32 * (warps_.size() + 1)) {
      std::fprintf(stderr, "emulation: a barrier is not reached by all threads\n");
      std::abort();
    }
    if (++idle_in_warp_ > 2 * 32) {
      idle_in_warp_ = 0;
      const size_t warps = warps_.size(), step = order_ == Order::kAscending ? 1 : warps - 1;
      current_ = (current_ / 32 + step) % warps * 32;
    } else {
      current_ = current_ / 32 * 32 + (current_ + 1) % 32;
    }
    if (fibers_[current_].done) longjmp(scheduler_, 1);
    Fiber& fiber = fibers_[current_];
    if (fiber.started) longjmp(fiber.position, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &Block::enter, 0);
    setcontext(&fiber.start);
  }

  unsigned thread() const { return static_cast<unsigned>(current_); }
  Warp& warp() { return warps_[current_ / 32]; }
  Barrier& barrier() { return barrier_; }
  unsigned threads() const { return static_cast<unsigned>(fibers_.size()); }

  void wait(Barrier& barrier, unsigned participants) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == participants) {
      barrier.arrived = 0;
      ++barrier.generation;
      idle_switches_ = idle_in_warp_ = 0;
    }
    while (barrier.generation == generation) {
      Fiber& fiber = fibers_[current_];
      if (setjmp(fiber.position) == 0) longjmp(scheduler_, 1);
    }
  }

  static Block*& active() {
    static Block* block = nullptr;
    return block;
  }

 private:
  static constexpr size_t kStackBytes = 32 << 10;

  static void enter() {
    Block& block = *active();
    (*block.body_)();
    block.fibers_[block.current_].done = true;
    --block.remaining_;
    block.idle_switches_ = block.idle_in_warp_ = 0;
    longjmp(block.scheduler_, 1);
  }

  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  Barrier barrier_;
  const std::function<void()>* body_ = nullptr;
  Order order_ = Order::kAscending;
  jmp_buf scheduler_;
  volatile size_t current_ = 0, remaining_ = 0, idle_switches_ = 0, idle_in_warp_ = 0;
};

// Every lane gives a value, then reads all of its warp's.
template <typename Read>
auto warp_collective(int64_t value, const Read& read) {
  Block& block = *Block::active();
  Warp& warp = block.warp();
  warp.values[block.thread() % 32] = value;
  block.wait(warp.barrier, 32);
  const auto result = read(warp.values, static_cast<int>(block.thread() % 32));
  block.wait(warp.barrier, 32);
  return result;
}

struct ThreadIndex {
  struct X {
    operator unsigned() const { return Block::active()->thread(); }
  } x;
};

}  // namespace emulation

inline emulation::ThreadIndex threadIdx;

inline void __syncthreads() {
  auto& block = *emulation::Block::active();
  block.wait(block.barrier(), block.threads());
}

inline void __syncwarp() {
  emulation::warp_collective(0, [](const int64_t*, int) { return 0; });
}

// The value of the lane that `source` says, of any type of up to eight bytes.
template <typename T, typename Source>
T shuffle(T value, const Source& source) {
  int64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  const int64_t received = emulation::warp_collective(
      bits, [&](const int64_t* values, int lane) { return values[source(lane)]; });
  std::memcpy(&value, &received, sizeof(value));
  return value;
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return shuffle(value, [=](int lane) { return lane ^ mask; });
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  return shuffle(value, [=](int lane) { return lane >= delta ? lane - delta : lane; });
}

template <typename T>
T __shfl_down_sync(unsigned, T value, int delta) {
  return shuffle(value, [=](int lane) { return lane + delta < 32 ? lane + delta : lane; });
}

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return shuffle(value, [=](int) { return from; });
}

template <typename T>  // int or unsigned
T __reduce_add_sync(unsigned, T value) {
  return emulation::warp_collective(value, [](const int64_t* values, int) {
    int64_t sum = 0;
    for (int i = 0; i < 32; ++i) sum += values[i];
    return static_cast<T>(sum);
  });
}

inline int __reduce_max_sync(unsigned, int value) {
  return emulation::warp_collective(value, [](const int64_t* values, int) {
    int64_t most = values[0];
    for (int i = 1; i < 32; ++i) most = values[i] > most ? values[i] : most;
    return static_cast<int>(most);
  });
}

inline unsigned __match_any_sync(unsigned, int value) {
  return emulation::warp_collective(value, [=](const int64_t* values, int) {
    unsigned peers = 0;
    for (int i = 0; i < 32; ++i) peers |= static_cast<unsigned>(values[i] == value) << i;
    return peers;
  });
}

inline unsigned __ballot_sync(unsigned, bool value) {
  return emulation::warp_collective(value, [](const int64_t* values, int) {
    unsigned set = 0;
    for (int i = 0; i < 32; ++i) set |= static_cast<unsigned>(values[i] != 0) << i;
    return set;
  });
}

inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }

inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
