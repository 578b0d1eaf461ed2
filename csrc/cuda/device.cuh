// What the kernels share: sizes of a block, vectors, tables in device memory, and what a launcher asks of a pointer.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "csrc/nf4/codec.h"

namespace squish::cuda {

constexpr int kThreads = 128;  // of a block: smaller blocks end and begin more evenly than large ones
constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// Sixteen bytes as one load or store; the pointer is aligned to them.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kValues = 16 / sizeof(T);
  T value[kValues];
};

template <typename Vector>
bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(Vector) == 0;
}

// Loads and stores of what is touched once: the first to leave the cache.
template <typename Vector>
__device__ inline Vector load_once(const Vector* from) {
  static_assert(sizeof(Vector) == 16);
  return std::bit_cast<Vector>(__ldcs(reinterpret_cast<const uint4*>(from)));
}
template <typename Vector>
__device__ inline void store_once(Vector* to, const Vector& vector) {
  static_assert(sizeof(Vector) == 16);
  __stcs(reinterpret_cast<uint4*>(to), std::bit_cast<uint4>(vector));
}

// Enough blocks to fill any GPU; what is left over, the plain kernels' loops take.
inline unsigned grid_for(int64_t work, int64_t per_block) {
  constexpr int64_t kMostBlocks = int64_t{1} << 20;
  return static_cast<unsigned>(std::min((work + per_block - 1) / per_block, kMostBlocks));
}

}  // namespace squish::cuda
