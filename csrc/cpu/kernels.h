// What every CPU path implements, and which one runs. The contract of each kernel stands here, once for all of them.
// Raw pointers in, bytes out: a kernel does not allocate, throw, print, lock, start threads, or know torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "csrc/cpu/tiles.h"
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

// --- the linear layer: y = x W^T, W packed ---
//
// A kernel reads four runs of rows side by side, one row of each at a time: memory serves four streams that lie apart
// much faster than one, or than four that are neighbours.
inline constexpr int kRuns = 4;

struct RowRuns {
  const uint8_t* packed[kRuns];  // each of `rows` contiguous packed rows
  const float* scales[kRuns];
  int64_t rows;
};

// Activations are multiplied in blocks of about equal length, because a short one keeps the processor less busy: its
// sums are too few to hide how long each multiplication takes.
constexpr Tiles blocks_of(int64_t m, int64_t most) { return cut_rows(m, 1, most); }

// Lays out a block of m activations as Multiply reads them.
//   x: m rows of d values, `stride` apart. columns: whole steps. out: step_elements for each step of each row.
// Columns from d on get zeros: they are the weight's padding.
template <typename T, typename Element>
using Pack = void (*)(const T* x, int64_t m, int64_t d, int64_t stride, int64_t columns, Element* out);

// The dot products of all rows of the runs with m activations, accumulated in float32:
//   sums[(i * rows + row) * kRuns + run] = sum over columns of decoded(run, row, column) * x[i](column)
//   x: the blocks_of(m, block), packed, one after another. scratch: linear_scratch<Element>(m, rows) elements, on 64
//   bytes.
// The order of summation depends on the path, columns and group_size, and on whether the activations are few enough to
// be multiplied while the weight is decoded. A decoded weight is rounded to Element; the products of two bfloat16 are
// exact, but subnormal ones count as zero.
// Promised by the caller: group_size >= 1, columns a multiple of 2 and of group_size.
template <typename Element>
using Multiply = void (*)(const RowRuns& runs, int64_t columns, int64_t group_size, const Element* x, int64_t m,
                          Element* scratch, float* sums);

// Columns of a row that are decoded at once: four rows and six activations of so many fit the first-level cache.
template <typename Element>
inline constexpr int64_t kLinearChunk = 4096 / sizeof(Element);

// Many activations pass over as many decoded rows as the second-level cache holds; few over the first-level cache's.
constexpr int64_t rows_decoded_at_once(int64_t m, int64_t rows) { return m < 64 ? 1 : std::min<int64_t>(rows, 16); }

template <typename Element>
constexpr int64_t linear_scratch(int64_t m, int64_t rows) {
  return rows_decoded_at_once(m, rows) * kRuns * kLinearChunk<Element>;
}

template <typename Element>
struct Packs;
template <>
struct Packs<float> {
  Pack<float, float> from_float32;
  Pack<BFloat16, float> from_bfloat16;
  Pack<Float16, float> from_float16;
};
template <>
struct Packs<BFloat16> {
  Pack<BFloat16, BFloat16> from_bfloat16;
};

template <>
struct Packs<int16_t> {
  Pack<BFloat16, int16_t> from_bfloat16;
  Pack<Float16, int16_t> from_float16;
};

template <typename Element>
struct LinearKernels {
  int64_t step;                                        // columns
  int64_t step_elements;                               // what a packed activation takes for a step
  int64_t block;                                       // activations, at most
  bool (*takes)(int64_t columns, int64_t group_size);  // null: all
  Packs<Element> pack;
  Multiply<Element> multiply;
};

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
  const LinearKernels<float>* linear;  // never null
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

template <typename T, typename Element>
Pack<T, Element> pack_kernel(const LinearKernels<Element>& kernels) {
  if constexpr (std::is_same_v<T, float>) return kernels.pack.from_float32;
  if constexpr (std::is_same_v<T, BFloat16>) return kernels.pack.from_bfloat16;
  if constexpr (std::is_same_v<T, Float16>) return kernels.pack.from_float16;
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
extern const LinearKernels<float> kAvx2Linear;           // x86-64 only
extern const LinearKernels<float> kAvx512Linear;         // x86-64 only
extern const Kernels kAvx2Kernels;                       // x86-64 only
extern const Kernels kAvx512Kernels;                     // x86-64 only
extern const LinearKernels<BFloat16> kAvx512Bf16Linear;  // x86-64 only
// Up to kMostInt16Activations 16-bit activations, finite and without outliers. x86-64 only.
inline constexpr int kMostInt16Activations = 4;
extern const LinearKernels<int16_t> kAvx2Int16Linear;

// Ascending: a path runs on a CPU that has everything the ones before it need.
enum class Isa : int { kScalar, kAvx2, kAvx512, kAvx512Bf16 };

struct Selection {
  const Kernels* kernels;                          // never null
  const LinearKernels<BFloat16>* linear_bfloat16;  // null where the processor does not multiply bfloat16
  const LinearKernels<int16_t>* linear_int16;      // null but on the AVX2 path
  Isa isa;
  bool has_amx;       // bfloat16 tiles (AMX_BF16): not used here, but by the library that torch multiplies with
  std::string error;  // not empty: SQUISH_NF4_ISA names something unknown or missing, and nothing may be computed
};

#define SQUISH_EXPORT __attribute__((visibility("default")))

// The path for this process: the best one the CPU has, capped by SQUISH_NF4_ISA. Decided at the first call.
SQUISH_EXPORT const Selection& selection();

// Bytes of the cache that all of this processor's cores, or a part of them, share; a guess where it cannot be asked.
SQUISH_EXPORT int64_t last_cache_bytes();

// "scalar", "avx2", "avx512" or "avx512_bf16": the names that SQUISH_NF4_ISA takes.
SQUISH_EXPORT const char* isa_name(Isa isa);

}  // namespace squish::cpu
