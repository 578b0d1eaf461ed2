// From a dtype to the type that kernels are chosen by, the same on CPU and CUDA. checks.h has refused all other dtypes.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include "csrc/nf4/float_bits.h"

namespace squish::ops {

// Calls with(T{}) for a dtype that can be computed in: float32, bfloat16 or float16.
template <typename With>
void with_storage_type(at::ScalarType dtype, const With& with) {
  if (dtype == at::kFloat) return with(float{});
  if (dtype == at::kBFloat16) return with(nf4::BFloat16{});
  TORCH_INTERNAL_ASSERT(dtype == at::kHalf);
  with(nf4::Float16{});
}

// Calls with(T{}) for a dtype that can be quantized: those, and float64.
template <typename With>
void with_weight_type(at::ScalarType dtype, const With& with) {
  if (dtype == at::kDouble) return with(double{});
  with_storage_type(dtype, with);
}

}  // namespace squish::ops
