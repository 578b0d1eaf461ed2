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

// y = x W' + bias for few activations. Sums are of float32, in an order that depends on the sizes and the GPU alone,
// and are rounded once.
template <typename T>
struct FewActivations {
  const T* x;             // m rows of x_columns values, x_stride apart; what is missing up to d counts as zero
  const uint8_t* packed;  // (n, d/2)
  const float* scales;    // (n, d/group_size)
  const T* bias;          // n values or null; one of the two at most
  const float* bias32;    // the same in float32
  T* y;                   // (m, n)
  void* scratch;          // of linear_few: linear_few_scratch() values of T, aligned to 16 bytes. Null if
                          // linear_few_reads_x(), x is contiguous and aligned to 16 bytes, and x_columns is d
  int64_t m, n, d, x_columns, x_stride, group_size;
};

// On tensor cores. T: nf4::BFloat16 or nf4::Float16. packed is aligned to 16 bytes.
template <typename T>
cudaError_t linear_few(const FewActivations<T>& call, cudaStream_t stream);

// Whether linear_few has a kernel for these sizes on the current device.
bool linear_few_takes(int64_t m, int64_t n, int64_t d, int64_t group_size);
bool linear_few_reads_x(int64_t m, int64_t group_size);
int64_t linear_few_scratch(int64_t m, int64_t d, int64_t group_size);

// Without tensor cores, for any group size. T: float, nf4::BFloat16 or nf4::Float16. Up to kMostPlainActivations it
// does less work than to decode the weight and to multiply with that.
template <typename T>
constexpr int kMostPlainActivations = sizeof(T) == 4 ? 32 : 16;
constexpr int64_t kMostPlainColumns = int64_t{1} << 26;  // so that 32 rows have fewer than 2^32 values
template <typename T>
cudaError_t linear_plain(const FewActivations<T>& call, cudaStream_t stream);

int multiprocessors();  // of the current device

}  // namespace squish::cuda
