// Device memory of test programs, which end where CUDA fails.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("FAIL %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// With no initial value, so that a sanitizer sees reads of what nobody wrote.
template <typename T>
class Room {
 public:
  explicit Room(size_t count) : count_(count) {
    void* pointer = nullptr;
    check(cudaMalloc(&pointer, count * sizeof(T)), "cudaMalloc");
    memory_.reset(static_cast<T*>(pointer));
  }
  explicit Room(const std::vector<T>& host) : Room(host.size()) {
    check(cudaMemcpy(get(), host.data(), count_ * sizeof(T), cudaMemcpyHostToDevice),
          "cudaMemcpy to the device");
  }
  T* get() const { return memory_.get(); }
  std::vector<T> to_host() const {
    std::vector<T> host(count_);
    check(cudaMemcpy(host.data(), get(), count_ * sizeof(T), cudaMemcpyDeviceToHost),
          "cudaMemcpy to the host");
    return host;
  }
  // NaN in every floating-point type here: what a kernel fails to write is found.
  void poison() { check(cudaMemset(get(), kPoison, count_ * sizeof(T)), "cudaMemset"); }
  // How many of `values`, copied from here, no longer are what poison() made of them, from `first`
  // on. By their bits: a kernel may write another NaN.
  static int overwritten(const std::vector<T>& values, size_t first) {
    return std::count_if(values.begin() + first, values.end(), [](const T& value) {
      const auto* bytes = reinterpret_cast<const uint8_t*>(&value);
      return std::any_of(bytes, bytes + sizeof(T), [](uint8_t byte) { return byte != kPoison; });
    });
  }

 private:
  static constexpr uint8_t kPoison = 0xff;
  struct Free {
    void operator()(T* pointer) const { cudaFree(pointer); }
  };
  size_t count_;
  std::unique_ptr<T, Free> memory_;
};
