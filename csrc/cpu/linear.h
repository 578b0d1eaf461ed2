// The linear layer on packed rows, without torch: y = x W^T + bias. First what every CPU path implements, then what a
// thread calls: plain C++ around a path's LinearKernels (linear.cpp).
#pragma once

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "csrc/cpu/tiles.h"
#include "csrc/nf4/float_bits.h"

namespace squish::cpu {

using nf4::BFloat16;
using nf4::Float16;

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

// Lays out a block of m activations as DotProducts reads them.
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
using DotProducts = void (*)(const RowRuns& runs, int64_t columns, int64_t group_size, const Element* x, int64_t m,
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

// What a path does with activations of type T.
//   suit: whether Element holds these about as well as T does; x as for Pack. null: it always does.
template <typename T, typename Element>
struct Activations {
  Pack<T, Element> pack;
  bool (*suit)(const T* x, int64_t m, int64_t d, int64_t stride) = nullptr;
};

// The types that an Element can be made of; std::get<Activations<T, Element>> finds the one for T.
template <typename Element>
struct ActivationsOf;
template <>
struct ActivationsOf<float> {
  using Types = std::tuple<Activations<float, float>, Activations<BFloat16, float>, Activations<Float16, float>>;
};
template <>
struct ActivationsOf<BFloat16> {
  using Types = std::tuple<Activations<BFloat16, BFloat16>>;
};
template <>
struct ActivationsOf<int16_t> {
  using Types = std::tuple<Activations<BFloat16, int16_t>, Activations<Float16, int16_t>>;
};

// Element: what is multiplied.
template <typename Element>
struct LinearKernels {
  int64_t step;           // columns
  int64_t step_elements;  // what a packed activation takes for a step
  int64_t block;          // activations, at most
  // Whether the kernels can multiply m activations with such a weight. null: always.
  bool (*takes)(int64_t m, int64_t columns, int64_t group_size) = nullptr;
  typename ActivationsOf<Element>::Types activations;
  DotProducts<Element> dot_products;
};

extern const LinearKernels<float> kScalarLinear;
extern const LinearKernels<float> kAvx2Linear;           // x86-64 only
extern const LinearKernels<int16_t> kAvx2Int16Linear;    // x86-64 only
extern const LinearKernels<float> kAvx512Linear;         // x86-64 only
extern const LinearKernels<BFloat16> kAvx512Bf16Linear;  // x86-64 only

// --- what a thread calls ---

// y = x W^T + bias. W: packed rows of `columns` columns. T: the type of y.
template <typename Element, typename T>
struct LinearTask {
  const LinearKernels<Element>& kernels;
  const uint8_t* packed;
  const float* scales;
  int64_t columns, group_size;
  const Element* x;  // m activations as pack_activations leaves them
  int64_t m;
  const float* bias;  // one a row of W, or null
  T* y;               // y[i * y_stride + row]
  int64_t y_stride;
};

// Elements of one packed activation.
template <typename Element>
int64_t packed_elements(const LinearKernels<Element>& kernels, int64_t columns) {
  return (columns + kernels.step - 1) / kernels.step * kernels.step_elements;
}

// Packs blocks [first, last) of blocks_of(m, kernels.block). x: rows of d values, `stride` apart.
// out: m * packed_elements, on 64 bytes.
template <typename Element, typename T>
void pack_activations(const LinearKernels<Element>& kernels, const T* x, int64_t m, int64_t d, int64_t stride,
                      int64_t columns, int64_t first, int64_t last, Element* out);

// Rows of W that one step of linear_rows covers in each of the kRuns runs.
inline constexpr int64_t kRowsOfRun = 16;

// Bytes of scratch that linear_rows needs.
template <typename Element>
constexpr int64_t linear_scratch_bytes(int64_t m) {
  return linear_scratch<Element>(m, kRowsOfRun) * int64_t{sizeof(Element)} +
         m * kRowsOfRun * kRuns * int64_t{sizeof(float)};
}

// Computes rows [first, last) of W for all activations. scratch: linear_scratch_bytes(m), on 64 bytes. A result does
// not depend on the rows that are computed with it. The bias is added in float32; y is rounded once.
template <typename Element, typename T>
void linear_rows(const LinearTask<Element, T>& task, int64_t first, int64_t last, void* scratch);

}  // namespace squish::cpu
