// What every CPU path implements of the codec. The contract of each kernel stands here, once for all paths; linear.h
// has that of the linear layer. Raw pointers in, bytes out: a kernel does not allocate, throw, print, lock, start
// threads, or know torch.
#pragma once

#include <cstdint>
#include <tuple>

#include "csrc/nf4/float_bits.h"

namespace squish::cpu {

using nf4::BFloat16;
using nf4::Float16;

// Encodes a run of columns: one row, some whole groups of a row, or several contiguous rows at once.
//   w: `columns` values. packed: columns/2 bytes. scales: columns/group_size floats. Each aligned for its type and no
//   further, no overlap.
// Promised by the caller: group_size >= 1, columns a multiple of 2 and of group_size, a default floating-point
// environment (csrc/cpu/float_environment.h).
template <typename T>
using Encode = void (*)(const T* w, int64_t columns, int64_t group_size, uint8_t* packed, float* scales);

// Decodes columns [first, last) of such a run; the same promises, and first and last are even. They need not be those
// of a group. The float32 product, rounded once more for a 16-bit T. out: last - first values.
template <typename T>
using Decode = void (*)(const uint8_t* packed, const float* scales, int64_t first, int64_t last, int64_t group_size,
                        T* out);

// Decode comes in a second form that stores past the caches, which is faster where the result is far larger than they
// are, and much slower where it is not. Promised besides: whole groups of a multiple of kPastCachesColumns
// columns, out on 64 bytes.
enum class Stores { kCached, kPastCaches };
inline constexpr int64_t kPastCachesColumns = 32;

// What a row of weights and its NF4 form say about each other. largest and sum are of the magnitudes, in float32 and
// float64; the squares are of w and of w minus what is decoded, in float64. A float64 w is first rounded to float32.
struct RowSurvey {
  double largest, sum, square, squared_error;
};

// Surveys one row of d values; packed and scales are what Encode made of it, perhaps with padding after the last
// column, which is not looked at. The sums are the same to the bit on every path: a column is added in float64 to one
// of kSurveyLanes running sums, which are added at the end.
template <typename T>
using Survey = RowSurvey (*)(const T* w, int64_t d, const uint8_t* packed, const float* scales, int64_t group_size);
inline constexpr int64_t kSurveyLanes = 16;

// The kernels for one type of dense values.
template <typename T>
struct Codec {
  Encode<T> encode;
  Decode<T> decode;
  Decode<T> decode_past_caches;
  Survey<T> survey;
};
template <>
struct Codec<double> {  // each value is first rounded to float32; nothing is decoded to it
  Encode<double> encode;
  Survey<double> survey;
};

using Codecs = std::tuple<Codec<float>, Codec<BFloat16>, Codec<Float16>, Codec<double>>;

extern const Codecs kScalarCodecs;
extern const Codecs kAvx2Codecs;    // x86-64 only
extern const Codecs kAvx512Codecs;  // x86-64 only

}  // namespace squish::cpu
