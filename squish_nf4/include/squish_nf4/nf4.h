// squish_nf4 for C++: the operators as functions on at::Tensor. Link squish_nf4::squish_nf4 (docs/native/cpp.md).
//
// Each call goes through torch's dispatcher: gradients, autocast and devices are those of torch.ops.squish. What the
// arguments must be is checked before anything is allocated: c10::ValueError for a shape or an undefined tensor,
// c10::TypeError for a dtype, c10::Error for tensors on different devices. The text names the operator, what was found
// and what is wanted.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#define SQUISH_API __attribute__((visibility("default")))

namespace squish {

// w: (n, d) float32, bfloat16, float16 or float64, any strides; d even and a multiple of group_size.
// Returns packed, (n, d/2) uint8, and scales, (n, d/group_size) float32. A group that holds NaN or infinity gets a NaN
// scale: nobody looks here, as the Python functions do (scales.isnan().any()).
SQUISH_API std::tuple<at::Tensor, at::Tensor> quantize_nf4(const at::Tensor& w, int64_t group_size = 32);

// Returns (n, d) in dtype: float32 (the default), bfloat16 or float16.
SQUISH_API at::Tensor dequantize_nf4(const at::Tensor& packed, const at::Tensor& scales, int64_t group_size = 32,
                                     std::optional<at::ScalarType> dtype = std::nullopt);

// The same into `out`: (n, d), contiguous, of one of these three dtypes; it is never resized. Returns `out`.
SQUISH_API at::Tensor& dequantize_nf4_out(at::Tensor& out, const at::Tensor& packed, const at::Tensor& scales,
                                          int64_t group_size = 32);

// x: (..., d) float32, bfloat16 or float16. bias: (n,) of one of these, or none; an undefined tensor is none.
// Returns (..., n) in the dtype of x.
// d: the packed columns, or fewer by less than lcm(2, group_size); those that are missing hold zeros.
SQUISH_API at::Tensor linear_nf4(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scales,
                                 const std::optional<at::Tensor>& bias = std::nullopt, int64_t group_size = 32);

}  // namespace squish
