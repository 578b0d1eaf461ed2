// The public C++ functions (squish_nf4/include/squish_nf4/nf4.h). Being symbols of the op library, they also keep a
// linker from leaving the library out of a program that uses the operators by name alone.
#include "squish_nf4/include/squish_nf4/nf4.h"

#include "csrc/ops/calls.h"
#include "csrc/ops/checks.h"

namespace squish {

std::tuple<at::Tensor, at::Tensor> quantize_nf4(const at::Tensor& w, int64_t group_size) {
  ops::check_defined("quantize_nf4", {{"w", w}});
  return ops::call_quantize(w, group_size);
}

at::Tensor dequantize_nf4(const at::Tensor& packed, const at::Tensor& scales, int64_t group_size,
                          std::optional<at::ScalarType> dtype) {
  ops::check_defined("dequantize_nf4", {{"packed", packed}, {"scales", scales}});
  return ops::call_dequantize(packed, scales, group_size, dtype);
}

at::Tensor& dequantize_nf4_out(at::Tensor& out, const at::Tensor& packed, const at::Tensor& scales,
                               int64_t group_size) {
  ops::check_defined("dequantize_nf4", {{"packed", packed}, {"scales", scales}, {"out", out}});
  return ops::call_dequantize_out(packed, scales, group_size, out);
}

at::Tensor linear_nf4(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scales,
                      const std::optional<at::Tensor>& bias, int64_t group_size) {
  ops::check_defined("linear_nf4", {{"x", x}, {"packed", packed}, {"scales", scales}});
  return ops::call_linear(x, packed, scales, bias, group_size);
}

}  // namespace squish
