// What the parts of test_core share: a check that ends the program, buffers that no byte can leave, the paths to test.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "csrc/cpu/dispatch.h"

#define CHECK(condition, ...)                                                       \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: %s is false: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                            \
      std::fputc('\n', stderr);                                                     \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (false)

namespace test {

// Where the bytes lie. kHeap has exactly the size asked for, and the address sanitizer around it. It does not see what
// masked vector instructions touch; the other two end, or begin, where a page begins that nobody may touch.
enum class Place { kHeap, kBeforeGuard, kAfterGuard };
inline constexpr Place kPlaces[] = {Place::kHeap, Place::kBeforeGuard, Place::kAfterGuard};

template <typename T>
class Buffer {
 public:
  Buffer(int64_t size, Place place) : size_(size), place_(place) {
    const size_t bytes = static_cast<size_t>(size) * sizeof(T);
    if (place == Place::kHeap) {
      data_ = static_cast<T*>(std::malloc(bytes));
      return;
    }
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t room = (bytes + page - 1) / page * page;
    mapped_bytes_ = room + page;
    mapped_ =
        static_cast<char*>(mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    CHECK(mapped_ != MAP_FAILED, "no memory");
    char* guard = place == Place::kBeforeGuard ? mapped_ + room : mapped_;
    CHECK(mprotect(guard, page, PROT_NONE) == 0, "no guard page");
    data_ = reinterpret_cast<T*>(place == Place::kBeforeGuard ? guard - bytes : guard + page);
  }
  Buffer(const std::vector<T>& values, Place place) : Buffer(static_cast<int64_t>(values.size()), place) {
    if (size_ != 0) std::memcpy(data_, values.data(), values.size() * sizeof(T));
  }
  ~Buffer() {
    if (place_ == Place::kHeap)
      std::free(data_);
    else
      munmap(mapped_, mapped_bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  int64_t size_;
  Place place_;
  T* data_ = nullptr;
  char* mapped_ = nullptr;
  size_t mapped_bytes_ = 0;
};

// Pseudo-random and the same everywhere (xorshift).
class Random {
 public:
  uint32_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>(state_ >> 32);
  }
  float between_minus_one_and_one() { return static_cast<float>(static_cast<int32_t>(bits())) * 0x1p-31f; }

 private:
  uint64_t state_ = 0x9e3779b97f4a7c15;
};

using squish::cpu::Path;

inline std::vector<Path> available_paths() {
  std::vector<Path> available;
  for (const Path& path : squish::cpu::paths())
    if (squish::cpu::is_available(path)) available.push_back(path);
  return available;
}

void check_float_bits();         // test_float_bits.cpp
void check_encode_and_decode();  // test_kernels.cpp
void check_float_environment();
void check_linear();  // test_linear.cpp
void check_tiles();

}  // namespace test
