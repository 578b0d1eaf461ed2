// The linear layer on packed rows, without torch: what a thread calls. Plain C++ around a path's LinearKernels.
#pragma once

#include <cstdint>

#include "csrc/cpu/kernels.h"

namespace squish::cpu {

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
