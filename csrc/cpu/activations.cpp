#include "csrc/cpu/activations.h"

#include <algorithm>

#include "csrc/cpu/kernels.h"

namespace squish::cpu {

using nf4::BFloat16;
using nf4::Float16;

namespace {

// Writes columns [start, start + count) of one activation: the even ones, then the odd ones.
template <typename T>
void split_block(const T* x, int64_t d, int64_t start, int64_t count, float* out) {
  float* even = out;
  float* odd = out + count / 2;
  const int64_t pairs = std::clamp<int64_t>((d - start) / 2, 0, count / 2);
  for (int64_t j = 0; j < pairs; ++j) {
    even[j] = nf4::to_float(x[start + 2 * j]);
    odd[j] = nf4::to_float(x[start + 2 * j + 1]);
  }
  std::fill(even + pairs, even + count / 2, 0.0f);
  std::fill(odd + pairs, odd + count / 2, 0.0f);
  if (d % 2 != 0 && d > start && pairs < count / 2) even[pairs] = nf4::to_float(x[d - 1]);
}

}  // namespace

template <typename T>
void split_columns(const T* x, int64_t m, int64_t d, int64_t x_stride, int64_t columns, int64_t group_size,
                   float* out) {
  const int64_t block = activation_block(m, columns, group_size);
  for (int64_t start = 0; start < columns; start += block) {
    const int64_t count = std::min(block, columns - start);
    for (int64_t i = 0; i < m; ++i) split_block(x + i * x_stride, d, start, count, out + m * start + i * count);
  }
}

template <typename T>
void add_bias(const float* y, const float* bias, int64_t rows, int64_t m, int64_t out_stride, T* out) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t r = 0; r < rows; ++r) {
      const float sum = bias == nullptr ? y[r * m + i] : y[r * m + i] + bias[r];
      out[i * out_stride + r] = nf4::from_float<T>(sum);
    }
}

template void split_columns(const float*, int64_t, int64_t, int64_t, int64_t, int64_t, float*);
template void split_columns(const BFloat16*, int64_t, int64_t, int64_t, int64_t, int64_t, float*);
template void split_columns(const Float16*, int64_t, int64_t, int64_t, int64_t, int64_t, float*);
template void add_bias(const float*, const float*, int64_t, int64_t, int64_t, float*);
template void add_bias(const float*, const float*, int64_t, int64_t, int64_t, BFloat16*);
template void add_bias(const float*, const float*, int64_t, int64_t, int64_t, Float16*);

}  // namespace squish::cpu
