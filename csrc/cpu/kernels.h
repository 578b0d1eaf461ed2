// What every CPU path implements of the codec. The contract of each kernel stands here, once for all paths; linear.h
// has that of the linear layer. Raw pointers in, bytes out: a kernel does not allocate, throw, print, lock, start
// threads, or know torch.
#pragma once

#include <cstdint>
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

// Decodes columns [first, last) of such a run; the same promises, and first and last are even. They need not be those
// of a group. The float32 product, rounded once more for a 16-bit T. out: last - first values.
template <typename T>
using Decode = void (*)(const uint8_t* packed, const float* scales, int64_t first, int64_t last, int64_t group_size,
                        T* out);

// A Decode may come in a second form that stores past the caches, which is faster where the result is far larger than
// they are, and much slower where it is not. Promised besides: whole groups of a multiple of kPastCachesColumns
// columns, out on 64 bytes.
enum class Stores { kCached, kPastCaches };
inline constexpr int64_t kPastCachesColumns = 32;

// What a row of weights and its NF4 form say about each other. largest and sum are of the magnitudes, in float32 and
// float64; the squares are of w and of w minus what is decoded, in float64. A float64 w is first rounded to float32.
struct RowSurvey {
  double largest, sum, square, squared_error;
};

// Surveys one row; the same promises as for Encode, of which packed and scales are the result. The sums are the same to
// the bit on every path: a column is added in float64 to one of kSurveyLanes running sums, which are added at the end.
template <typename T>
using Survey = RowSurvey (*)(const T* w, const uint8_t* packed, const float* scales, int64_t columns,
                             int64_t group_size);
inline constexpr int64_t kSurveyLanes = 16;

struct Kernels {
  Encode<float> encode_float32;
  Encode<double> encode_float64;  // each value is first rounded to float32
  Encode<BFloat16> encode_bfloat16;
  Encode<Float16> encode_float16;
  Decode<float> decode_float32;
  Decode<BFloat16> decode_bfloat16;
  Decode<Float16> decode_float16;
  Decode<float> decode_float32_past_caches;
  Decode<BFloat16> decode_bfloat16_past_caches;
  Decode<Float16> decode_float16_past_caches;
  Survey<float> survey_float32;
  Survey<double> survey_float64;
  Survey<BFloat16> survey_bfloat16;
  Survey<Float16> survey_float16;
};

template <typename T>
Survey<T> survey_kernel(const Kernels& kernels) {
  if constexpr (std::is_same_v<T, float>) return kernels.survey_float32;
  if constexpr (std::is_same_v<T, double>) return kernels.survey_float64;
  if constexpr (std::is_same_v<T, BFloat16>) return kernels.survey_bfloat16;
  if constexpr (std::is_same_v<T, Float16>) return kernels.survey_float16;
}

template <typename T>
Encode<T> encode_kernel(const Kernels& kernels) {
  if constexpr (std::is_same_v<T, float>) return kernels.encode_float32;
  if constexpr (std::is_same_v<T, double>) return kernels.encode_float64;
  if constexpr (std::is_same_v<T, BFloat16>) return kernels.encode_bfloat16;
  if constexpr (std::is_same_v<T, Float16>) return kernels.encode_float16;
}

template <typename T>
Decode<T> decode_kernel(const Kernels& kernels, Stores stores = Stores::kCached) {
  const bool cached = stores == Stores::kCached;
  if constexpr (std::is_same_v<T, float>) return cached ? kernels.decode_float32 : kernels.decode_float32_past_caches;
  if constexpr (std::is_same_v<T, BFloat16>)
    return cached ? kernels.decode_bfloat16 : kernels.decode_bfloat16_past_caches;
  if constexpr (std::is_same_v<T, Float16>) return cached ? kernels.decode_float16 : kernels.decode_float16_past_caches;
}

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;    // x86-64 only
extern const Kernels kAvx512Kernels;  // x86-64 only

}  // namespace squish::cpu
