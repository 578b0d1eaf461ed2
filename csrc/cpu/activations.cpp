#include "csrc/cpu/activations.h"

#include <algorithm>

namespace squish::cpu {

using nf4::BFloat16;
using nf4::Float16;

template <typename T>
void split_columns(const T* x, int64_t m, int64_t d, int64_t x_stride, int64_t columns, float* out) {
  const int64_t half = columns / 2;
  for (int64_t i = 0; i < m; ++i) {
    const T* xi = x + i * x_stride;
    float* even = out + i * columns;
    float* odd = even + half;
    for (int64_t j = 0; j < d / 2; ++j) {
      even[j] = nf4::to_float(xi[2 * j]);
      odd[j] = nf4::to_float(xi[2 * j + 1]);
    }
    std::fill(even + d / 2, even + half, 0.0f);
    std::fill(odd + d / 2, odd + half, 0.0f);
    if (d % 2 != 0) even[d / 2] = nf4::to_float(xi[d - 1]);
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

template void split_columns(const float*, int64_t, int64_t, int64_t, int64_t, float*);
template void split_columns(const BFloat16*, int64_t, int64_t, int64_t, int64_t, float*);
template void split_columns(const Float16*, int64_t, int64_t, int64_t, int64_t, float*);
template void add_bias(const float*, const float*, int64_t, int64_t, int64_t, float*);
template void add_bias(const float*, const float*, int64_t, int64_t, int64_t, BFloat16*);
template void add_bias(const float*, const float*, int64_t, int64_t, int64_t, Float16*);

}  // namespace squish::cpu
