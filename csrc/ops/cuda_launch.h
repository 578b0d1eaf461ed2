// What a launcher of csrc/cuda returned.
#pragma once

#include <c10/util/Exception.h>

#include "csrc/cuda/kernels.h"

namespace squish::ops {

// Raises what CUDA says of the operator's launch; it may be about work that the GPU was given before.
inline void check_launch(const char* op, cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, op, ": a CUDA kernel was not launched: ", cudaGetErrorString(error), " (",
              cudaGetErrorName(error), "); it may be an earlier call's error, CUDA_LAUNCH_BLOCKING=1 tells");
}

}  // namespace squish::ops
