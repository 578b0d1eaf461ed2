// What stands around the fused linear kernel: activations to float32 and back. Plain C++, one implementation.
#pragma once

#include <cstdint>

#include "csrc/nf4/float_bits.h"

namespace squish::cpu {

// Prepares m activations for LinearRows, as float32. out is cut into blocks of activation_block(m, columns, group_size)
// columns, the last one shorter; a block holds, for each activation, the even columns of the block and then the odd
// ones.
//   x: m rows of d values, x_stride apart. out: m * columns floats. d <= columns; group_size even, divides columns.
// The columns from d on are the weight's padding: they get zeros.
template <typename T>
void split_columns(const T* x, int64_t m, int64_t d, int64_t x_stride, int64_t columns, int64_t group_size, float* out);

// Finishes what LinearRows computed: out[i][r] = y[r][i] + bias[r], added in float32 and rounded once.
//   y: `rows` rows of m floats. bias: `rows` floats, or null. out: m rows, out_stride apart.
template <typename T>
void add_bias(const float* y, const float* bias, int64_t rows, int64_t m, int64_t out_stride, T* out);

}  // namespace squish::cpu
