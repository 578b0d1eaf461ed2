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

// y = x W' + bias for few activations, T: nf4::BFloat16 or nf4::Float16. x: (m, d), y: (m, n), both contiguous; packed
// and scales: of n rows of d columns. At most one bias, of n values, in the type of x or in float32; else null. Sums
// are of float32, in an order that depends on the sizes alone, and are rounded once. Promised by the caller:
// linear_few_takes(), x and packed aligned to 16 bytes, scales to 8.
template <typename T>
cudaError_t linear_few(const T* x, const uint8_t* packed, const float* scales, const T* bias, const float* bias32, T* y,
                       int64_t m, int64_t n, int64_t d, int64_t group_size, cudaStream_t stream);

// Whether linear_few has a kernel for these sizes on the current device.
bool linear_few_takes(int64_t m, int64_t n, int64_t d, int64_t group_size);

}  // namespace squish::cuda
