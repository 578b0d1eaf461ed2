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

}  // namespace squish::cuda
