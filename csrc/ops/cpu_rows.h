// The CPU kernels on tensors: which kernel fits a dtype, and how a matrix is shared out among threads. The bytes do not
// depend on the number of threads, because a thread always takes whole groups.
#pragma once

#include <ATen/core/Tensor.h>

#include <numeric>

#include "csrc/cpu/float_environment.h"
#include "csrc/cpu/kernels.h"
#include "csrc/ops/parallel.h"
#include "csrc/ops/storage_types.h"

namespace squish::ops {

using at::Tensor;

// The selected path; refuses to compute anything if SQUISH_NF4_ISA asks for one that is not there.
inline const cpu::Selection& selected() {
  const cpu::Selection& selection = cpu::selection();
  TORCH_CHECK_VALUE(selection.error.empty(), selection.error);
  return selection;
}

// Calls run(first_column, columns) for stretches of the n*d columns of a matrix, counted row by row. A stretch is a
// multiple of lcm(2, group_size) columns; it may pass the end of a row only if `contiguous`.
template <typename Run>
void for_each_stretch(int64_t n, int64_t d, int64_t group_size, bool contiguous, const Run& run) {
  constexpr int64_t kColumnsPerThread = 32768;  // below this a second thread costs more than it saves
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

// Decodes rows [first, first + out.size(0)) of a contiguous packed matrix into `out`, contiguous.
inline void decode_rows(const cpu::Kernels& kernels, const Tensor& packed, const Tensor& scales, int64_t group_size,
                        int64_t first, const Tensor& out) {
  const int64_t columns = packed.size(1) * 2;
  const uint8_t* bytes = packed.const_data_ptr<uint8_t>() + first * (columns / 2);
  const float* scale = scales.const_data_ptr<float>() + first * (columns / group_size);
  with_storage_type(out.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    T* values = static_cast<T*>(out.mutable_data_ptr());
    for_each_stretch(out.size(0), columns, group_size, /*contiguous=*/true, [&](int64_t at, int64_t count) {
      cpu::decode_kernel<T>(kernels)(bytes + at / 2, scale + at / group_size, count, group_size, values + at);
    });
  });
}

}  // namespace squish::ops
