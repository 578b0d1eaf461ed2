// What every CPU path implements, and which one runs. The contract of each kernel stands here, once for all of them.
// Raw pointers in, bytes out: a kernel does not allocate, throw, print, lock, start threads, or know torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "csrc/nf4/float_bits.h"

namespace squish::cpu {

using nf4::BFloat16;
using nf4::Float16;

// Encodes a run of columns: one row, some whole groups of a row, or several contiguous rows at once.
//   w: `columns` values. packed: columns/2 bytes. scales: columns/group_size floats. No alignment needed, no overlap.
// Promised by the caller: group_size >= 1, columns a multiple of 2 and of group_size, a default floating-point
// environment (csrc/cpu/float_environment.h).
template <typename T>
using Encode = void (*)(const T* w, int64_t columns, int64_t group_size, uint8_t* packed, float* scales);

// Decodes such a run; the same promises. The float32 product, rounded once more for a 16-bit T.
template <typename T>
using Decode = void (*)(const uint8_t* packed, const float* scales, int64_t columns, int64_t group_size, T* out);

// Multiplies `rows` contiguous packed rows with m activations, in float32, without storing a decoded weight:
//   y[r * m + i] = sum over columns of decoded(r, column) * x[i](column)
//   x: m * columns floats, laid out by split_columns (csrc/cpu/activations.h).
// Promised by the caller: group_size even and a divisor of columns, 1 <= m <= kLinearBatch.
// The order of summation depends on the path, m, columns and group_size, and on nothing else.
using LinearRows = void (*)(const uint8_t* packed, const float* scales, int64_t rows, int64_t columns,
                            int64_t group_size, const float* x, int64_t m, float* y);
inline constexpr int64_t kLinearBatch = 8;

// The activations are cut into blocks of columns, so that those of one block stay in the first-level cache while all
// rows pass; a block is whole groups. One block lies in one piece: m streams that are a row apart would meet in the
// same few sets of the cache wherever a row is a multiple of a page.
constexpr int64_t activation_block(int64_t m, int64_t columns, int64_t group_size) {
  constexpr int64_t kFloats = 8192;
  return std::min(columns, std::max<int64_t>(1, kFloats / m / group_size) * group_size);
}

struct Kernels {
  Encode<float> encode_float32;
  Encode<double> encode_float64;  // each value is first rounded to float32
  Encode<BFloat16> encode_bfloat16;
  Encode<Float16> encode_float16;
  Decode<float> decode_float32;
  Decode<BFloat16> decode_bfloat16;
  Decode<Float16> decode_float16;
  LinearRows linear_rows;
};

template <typename T>
Encode<T> encode_kernel(const Kernels& kernels) {
  if constexpr (std::is_same_v<T, float>) return kernels.encode_float32;
  if constexpr (std::is_same_v<T, double>) return kernels.encode_float64;
  if constexpr (std::is_same_v<T, BFloat16>) return kernels.encode_bfloat16;
  if constexpr (std::is_same_v<T, Float16>) return kernels.encode_float16;
}

template <typename T>
Decode<T> decode_kernel(const Kernels& kernels) {
  if constexpr (std::is_same_v<T, float>) return kernels.decode_float32;
  if constexpr (std::is_same_v<T, BFloat16>) return kernels.decode_bfloat16;
  if constexpr (std::is_same_v<T, Float16>) return kernels.decode_float16;
}

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;    // x86-64 only
extern const Kernels kAvx512Kernels;  // x86-64 only

// Ascending: a path runs on a CPU that has everything the ones before it need.
enum class Isa : int { kScalar, kAvx2, kAvx512, kAvx512Bf16 };

struct Selection {
  const Kernels* kernels;  // never null
  Isa isa;
  std::string error;  // not empty: SQUISH_NF4_ISA names something unknown or missing, and nothing may be computed
};

#define SQUISH_EXPORT __attribute__((visibility("default")))

// The path for this process: the best one the CPU has, capped by SQUISH_NF4_ISA. Decided at the first call.
SQUISH_EXPORT const Selection& selection();

// "scalar", "avx2", "avx512" or "avx512_bf16": the names that SQUISH_NF4_ISA takes.
SQUISH_EXPORT const char* isa_name(Isa isa);

}  // namespace squish::cpu
