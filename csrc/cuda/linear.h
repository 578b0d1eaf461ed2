// The two kernels of the linear layer, between which linear.cpp chooses.
#pragma once

#include "csrc/cuda/kernels.h"

namespace squish::cuda {

// On tensor cores. T: nf4::BFloat16 or nf4::Float16. packed is aligned to 16 bytes. Without scratch, x is contiguous,
// aligned to 16 bytes, and x_columns is d.
template <typename T>
cudaError_t linear_small_m(const FewActivations<T>& call, cudaStream_t stream);

// Whether it has a kernel for these sizes on the current device; if so, whether that can do without scratch; and how
// many values the scratch has.
bool linear_small_m_takes(int64_t m, int64_t n, int64_t d, int64_t group_size);
bool linear_small_m_reads_x(int64_t m, int64_t group_size);
int64_t linear_small_m_scratch(int64_t m, int64_t d, int64_t group_size);

// Without tensor cores, for any group size, in float32.
template <typename T>
cudaError_t linear_plain(const FewActivations<T>& call, cudaStream_t stream);

}  // namespace squish::cuda
