// Launchers of the CUDA kernels. Device pointers, sizes and the stream; they return the launch's error and do not
// synchronize. The contracts are those of csrc/cpu/kernels.h, over whole contiguous matrices of n*d columns.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/nf4/float_bits.h"

namespace squish::cuda {

// w: rows of d values, row_stride values apart. T: float, double, nf4::BFloat16 or nf4::Float16.
template <typename T>
cudaError_t quantize(const T* w, int64_t n, int64_t d, int64_t row_stride, int64_t group_size, uint8_t* packed,
                     float* scales, cudaStream_t stream);

// T: float, nf4::BFloat16 or nf4::Float16.
template <typename T>
cudaError_t dequantize(const uint8_t* packed, const float* scales, int64_t count, int64_t group_size, T* out,
                       cudaStream_t stream);

// Of each row of w: the largest magnitude, the sum of magnitudes, and the squared norms of w and of what NF4 loses, to
// the bit what a Survey of csrc/cpu/kernels.h finds, but for the bits of a NaN. packed: rows of row_bytes. T: as for
// quantize. out: (n, 4).
template <typename T>
cudaError_t survey(const T* w, int64_t n, int64_t d, int64_t row_stride, const uint8_t* packed, const float* scales,
                   int64_t row_bytes, int64_t group_size, double* out, cudaStream_t stream);

// y = x W' + bias for few activations, without the weight decoded in memory. Sums are of float32, in an order that
// depends on the sizes and the GPU alone, and are rounded once. T: float, nf4::BFloat16 or nf4::Float16.
template <typename T>
struct FewActivations {
  const T* x = nullptr;           // m rows of x_columns values, x_stride apart; what is missing up to d counts as zero
  const uint8_t* packed;          // (n, d/2)
  const float* scales;            // (n, d/group_size)
  const T* bias = nullptr;        // n values or null; one of the two at most
  const float* bias32 = nullptr;  // the same in float32
  T* y;                           // (m, n)
  void* scratch = nullptr;        // linear_scratch() values of T, aligned to 16 bytes; null if that is zero
  int64_t m, n, d, x_columns, x_stride = 0, group_size;
};

// Whether a kernel takes this product on the current device; x, y, the bias and the scratch do not matter.
template <typename T>
bool linear_takes(const FewActivations<T>& call);
template <typename T>
int64_t linear_scratch(const FewActivations<T>& call);
template <typename T>
cudaError_t linear(const FewActivations<T>& call, cudaStream_t stream);

int multiprocessors();  // of the current device

}  // namespace squish::cuda
