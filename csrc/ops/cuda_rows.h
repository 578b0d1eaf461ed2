// Rows of a packed weight, decoded on the current CUDA stream: what the codec and the linear operators share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAStream.h>

#include "csrc/cuda/kernels.h"
#include "csrc/ops/cuda_launch.h"
#include "csrc/ops/storage_types.h"

namespace squish::ops {

using at::Tensor;

// Decodes rows [first, first + out.size(0)) of a contiguous packed matrix into `out`, contiguous, for the operator
// `op`.
inline void decode_rows_cuda(const char* op, const Tensor& packed, const Tensor& scales, int64_t group_size,
                             int64_t first, const Tensor& out) {
  const uint8_t* bytes = packed.const_data_ptr<uint8_t>() + first * packed.size(1);
  const float* scale = scales.const_data_ptr<float>() + first * scales.size(1);
  const auto stream = c10::cuda::getCurrentCUDAStream().stream();
  with_storage_type(out.scalar_type(), [&](auto zero) {
    auto* values = static_cast<decltype(zero)*>(out.mutable_data_ptr());
    check_launch(op, cuda::dequantize(bytes, scale, out.numel(), group_size, values, stream));
  });
}

}  // namespace squish::ops
