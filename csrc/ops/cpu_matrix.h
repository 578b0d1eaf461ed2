// The CPU's codec on matrices: the path in use, how the columns of a matrix are shared out among threads, and decoding
// of a whole matrix or of some columns. The bytes do not depend on the number of threads, because a thread always takes
// whole groups.
#pragma once

#include <ATen/core/Tensor.h>

#include <numeric>

#include "csrc/cpu/dispatch.h"
#include "csrc/cpu/float_environment.h"
#include "csrc/ops/parallel.h"
#include "csrc/ops/storage_types.h"

namespace squish::ops {

using at::Tensor;

inline constexpr int64_t kColumnsPerThread = 32768;  // below this a second thread costs more than it saves

// The selected path; refuses to compute anything if SQUISH_NF4_ISA asks for one that is not there.
inline const cpu::Path& selected() {
  const cpu::Selection& selection = cpu::selection();
  TORCH_CHECK_VALUE(selection.error.empty(), selection.error);
  return *selection.path;
}

// Calls run(first_column, columns) for stretches of the n*d columns of a matrix, counted row by row. A stretch is a
// multiple of lcm(2, group_size) columns; it may pass the end of a row only if `contiguous`.
template <typename Run>
void for_each_stretch(int64_t n, int64_t d, int64_t group_size, bool contiguous, const Run& run) {
  if (n == 0 || d == 0) return;
  const int64_t block = std::lcm(int64_t{2}, group_size);
  const int64_t row_blocks = contiguous ? n * (d / block) : d / block;
  const int64_t grain = std::max<int64_t>(1, kColumnsPerThread / block);
  parallel_for(0, n * (d / block), grain, [&](int64_t begin, int64_t end) {
    const cpu::DefaultFloatEnvironment environment;
    while (begin < end) {
      const int64_t count = std::min(end - begin, row_blocks - begin % row_blocks);
      run(begin * block, count * block);
      begin += count;
    }
  });
}

// The stores for a large result in memory that is there already. The pages of fresh memory are cleared by the system
// when they are first touched, and then lie in the caches: stores past these would only push them out.
inline cpu::Stores stores_for(const Tensor& out, int64_t group_size) {
  const bool possible =
      group_size % cpu::kPastCachesColumns == 0 && reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 64 == 0;
  const bool large = static_cast<int64_t>(out.nbytes()) > cpu::last_cache_bytes() * 3 / 2;
  return possible && large ? cpu::Stores::kPastCaches : cpu::Stores::kCached;
}

// Decodes a contiguous packed matrix into `out`, contiguous.
inline void decode_matrix(const cpu::Path& path, const Tensor& packed, const Tensor& scales, int64_t group_size,
                          const Tensor& out, cpu::Stores stores = cpu::Stores::kCached) {
  const uint8_t* bytes = packed.const_data_ptr<uint8_t>();
  const float* scale = scales.const_data_ptr<float>();
  with_storage_type(out.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    T* values = static_cast<T*>(out.mutable_data_ptr());
    const auto& codec = path.codec<T>();
    const auto decode = stores == cpu::Stores::kPastCaches ? codec.decode_past_caches : codec.decode;
    for_each_stretch(out.size(0), out.size(1), group_size, /*contiguous=*/true, [&](int64_t at, int64_t count) {
      decode(bytes + at / 2, scale + at / group_size, 0, count, group_size, values + at);
    });
  });
}

// Decodes columns [first, first + tile.size(1)) of all rows into `tile`, contiguous; both numbers are even.
inline void decode_column_tile(const cpu::Path& path, const Tensor& packed, const Tensor& scales, int64_t group_size,
                               int64_t first, const Tensor& tile) {
  constexpr int64_t kRowsAhead = 8;
  const int64_t row_bytes = packed.size(1), groups = scales.size(1), count = tile.size(1);
  const uint8_t* bytes = packed.const_data_ptr<uint8_t>();
  const float* scale = scales.const_data_ptr<float>();
  with_storage_type(tile.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    T* values = static_cast<T*>(tile.mutable_data_ptr());
    const auto decode = path.codec<T>().decode;
    parallel_for(0, tile.size(0), std::max<int64_t>(1, kColumnsPerThread / count), [&](int64_t begin, int64_t end) {
      const cpu::DefaultFloatEnvironment environment;
      for (int64_t row = begin; row < end; ++row) {
        // A row's part is too short for a processor to see where the next one lies.
        const int64_t ahead = std::min(row + kRowsAhead, end - 1);
        for (int64_t at = first / 2; at < (first + count) / 2; at += 64)
          __builtin_prefetch(bytes + ahead * row_bytes + at);
        __builtin_prefetch(scale + ahead * groups + first / group_size);
        decode(bytes + row * row_bytes, scale + row * groups, first, first + count, group_size, values + row * count);
      }
    });
  });
}

}  // namespace squish::ops
