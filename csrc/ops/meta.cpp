// Shapes and dtypes of the results, for FakeTensor, torch.compile, torch.export and the meta device.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"

namespace squish::ops {
namespace {

std::tuple<Tensor, Tensor> quantize_nf4(const Tensor& w, int64_t group_size) {
  check_weight(w, group_size);
  const c10::SymInt n = w.sym_size(0), d = w.sym_size(1);
  return {at::empty_symint({n, d / 2}, w.options().dtype(at::kByte)),
          at::empty_symint({n, d / group_size}, w.options().dtype(at::kFloat))};
}

Tensor dequantize_nf4(const Tensor& packed, const Tensor& scales, int64_t group_size,
                      std::optional<at::ScalarType> dtype) {
  check_dequantize(packed, scales, group_size, dtype);
  return at::empty_symint({packed.sym_size(0), packed.sym_size(1) * 2},
                          packed.options().dtype(dtype.value_or(at::kFloat)));
}

Tensor& dequantize_nf4_out(const Tensor& packed, const Tensor& scales, int64_t group_size, Tensor& out) {
  check_dequantize_out(packed, scales, group_size, out);
  return out;
}

Tensor linear_nf4(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& bias,
                  int64_t group_size) {
  check_linear(x, packed, scales, bias, group_size);
  return at::empty_symint(with_last_dim(x, packed.sym_size(0)), x.options());
}

Tensor linear_nf4_grad_x(const Tensor& dy, const Tensor& packed, const Tensor& scales, int64_t group_size,
                         c10::SymInt d) {
  check_linear_grad_x(dy, packed, scales, group_size, d);
  return at::empty_symint(with_last_dim(dy, std::move(d)), dy.options());
}

Tensor survey_nf4(const Tensor& w, const Tensor& packed, const Tensor& scales, int64_t group_size) {
  check_survey(w, packed, scales, group_size);
  return at::empty_symint({w.sym_size(0), c10::SymInt(4)}, w.options().dtype(at::kDouble));
}

}  // namespace

TORCH_LIBRARY_IMPL(squish, Meta, m) {
  m.impl("quantize_nf4", &quantize_nf4);
  m.impl("dequantize_nf4", &dequantize_nf4);
  m.impl("dequantize_nf4.out", &dequantize_nf4_out);
  m.impl("linear_nf4", &linear_nf4);
  m.impl("_survey_nf4", &survey_nf4);
  m.impl("_linear_nf4_grad_x", &linear_nf4_grad_x);
}

}  // namespace squish::ops
