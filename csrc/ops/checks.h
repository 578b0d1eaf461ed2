// Every check of the operators and every text that refuses an argument: once, for CPU, CUDA and Meta.
// Sizes are symbolic (a plain integer is the common case of a SymInt): under export and compile a check becomes a guard
// where the size is known and is left to run time where it is not. Nothing is allocated before the checks have passed.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/core/SymBool.h>
#include <c10/core/SymInt.h>

#include <initializer_list>
#include <numeric>
#include <optional>
#include <string>

namespace squish::ops {

using at::Tensor;

#define SQUISH_CHECK_SIZE(condition, ...) TORCH_CHECK_VALUE(TORCH_GUARD_OR_TRUE(condition), __VA_ARGS__)

// "uint8", as Python says it; ScalarType itself prints as "Byte".
inline std::string name_of(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

// An optional tensor that is undefined counts as none, as in ATen's own operators.
inline bool is_given(const std::optional<Tensor>& tensor) { return tensor && tensor->defined(); }

struct Argument {
  const char* name;
  const Tensor& tensor;
};

// Only C++ can pass an undefined tensor. Where all are, the dispatcher finds no backend to ask here: api.cpp asks, too.
inline void check_defined(const char* op, std::initializer_list<Argument> arguments) {
  for (const auto& [name, tensor] : arguments)
    TORCH_CHECK_VALUE(tensor.defined(), op, ": ", name, " must be a defined tensor, got an undefined one");
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor, const char* first_name,
                              const Tensor& first) {
  check_defined(op, {{first_name, first}, {name, tensor}});
  TORCH_CHECK(tensor.device() == first.device(), op, ": ", name, " is on ", tensor.device(), " but ", first_name,
              " is on ", first.device(), "; they must be on one device");
}

inline bool is_compute_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

// hint: what else to say to whoever gave this dtype.
inline void check_compute_dtype(const char* op, const char* name, at::ScalarType dtype, const char* hint = "") {
  TORCH_CHECK_TYPE(is_compute_dtype(dtype), op, ": ", name, " must be float32, bfloat16 or float16, got ",
                   name_of(dtype), hint);
}

inline void check_weight_dtype(const char* op, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(is_compute_dtype(dtype) || dtype == at::kDouble, op,
                   ": w must be float32, bfloat16, float16 or float64, got ", name_of(dtype));
}

// The upper bound only keeps the arithmetic below from overflowing where there are no columns to divide.
inline void check_group_size(const char* op, int64_t group_size) {
  constexpr int64_t kMost = int64_t{1} << 40;
  TORCH_CHECK_VALUE(group_size >= 1, op, ": group_size must be at least 1, got ", group_size);
  TORCH_CHECK_VALUE(group_size <= kMost, op, ": group_size must be at most ", kMost, ", got ", group_size);
}

inline void check_weight(const Tensor& w, int64_t group_size) {
  constexpr auto op = "quantize_nf4";
  check_weight_dtype(op, w.scalar_type());
  TORCH_CHECK_VALUE(w.dim() == 2, op, ": w must be 2-D (rows, columns), got ", w.dim(), "-D");
  check_group_size(op, group_size);
  const c10::SymInt d = w.sym_size(1);
  SQUISH_CHECK_SIZE((d % 2).sym_eq(0), op, ": w has ", d, " columns; two share a byte, so their number must be even");
  SQUISH_CHECK_SIZE((d % group_size).sym_eq(0), op, ": w has ", d,
                    " columns, not a multiple of group_size=", group_size);
}

// A quantized weight: packed (n, d/2) uint8 and scales (n, d/group_size) float32.
inline void check_packed(const char* op, const Tensor& packed, const Tensor& scales, int64_t group_size) {
  check_same_device(op, "scales", scales, "packed", packed);
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kByte, op, ": packed must be uint8, got ",
                   name_of(packed.scalar_type()));
  TORCH_CHECK_TYPE(scales.scalar_type() == at::kFloat, op, ": scales must be float32, got ",
                   name_of(scales.scalar_type()));
  TORCH_CHECK_VALUE(packed.dim() == 2, op, ": packed must be 2-D (rows, columns/2), got ", packed.dim(), "-D");
  TORCH_CHECK_VALUE(scales.dim() == 2, op, ": scales must be 2-D (rows, columns/group_size), got ", scales.dim(), "-D");
  check_group_size(op, group_size);
  const c10::SymInt n = packed.sym_size(0), d = packed.sym_size(1) * 2;
  SQUISH_CHECK_SIZE(scales.sym_size(0).sym_eq(n), op, ": scales has ", scales.sym_size(0), " rows but packed has ", n);
  SQUISH_CHECK_SIZE((d % group_size).sym_eq(0), op, ": packed holds ", d,
                    " columns, not a multiple of group_size=", group_size);
  SQUISH_CHECK_SIZE((scales.sym_size(1) * group_size).sym_eq(d), op, ": scales has ", scales.sym_size(1),
                    " columns; packed holds ", d, " columns, which at group_size=", group_size, " need ",
                    d / group_size);
}

inline void check_dequantize(const Tensor& packed, const Tensor& scales, int64_t group_size,
                             std::optional<at::ScalarType> dtype) {
  check_packed("dequantize_nf4", packed, scales, group_size);
  if (dtype) check_compute_dtype("dequantize_nf4", "dtype", *dtype);
}

inline void check_dequantize_out(const Tensor& packed, const Tensor& scales, int64_t group_size, const Tensor& out) {
  constexpr auto op = "dequantize_nf4";
  check_packed(op, packed, scales, group_size);
  check_same_device(op, "out", out, "packed", packed);
  check_compute_dtype(op, "out", out.scalar_type());
  const c10::SymInt n = packed.sym_size(0), d = packed.sym_size(1) * 2;
  TORCH_CHECK_VALUE(out.dim() == 2, op, ": out must be 2-D (rows, columns), got ", out.dim(), "-D");
  SQUISH_CHECK_SIZE(out.sym_size(0).sym_eq(n).sym_and(out.sym_size(1).sym_eq(d)), op, ": out has shape ",
                    out.sym_sizes(), "; the result has ", n, " rows and ", d, " columns, and out is never resized");
  SQUISH_CHECK_SIZE(out.sym_is_contiguous(), op, ": out must be contiguous, got strides ", out.sym_strides());
}

// x or w may have fewer columns than the packed weight: the last, incomplete block of lcm(2, group_size) is padding.
inline void check_padding(const char* op, const char* what, const c10::SymInt& d, const c10::SymInt& columns,
                          int64_t group_size) {
  const int64_t block = std::lcm(int64_t{2}, group_size);
  SQUISH_CHECK_SIZE(d.sym_le(columns).sym_and(columns.sym_lt(d + block)), op, ": ", what, " ", d,
                    " columns but packed holds ", columns, " (as many, or up to ", block - 1,
                    " more as padding, are wanted at group_size=", group_size, ")");
}

// w, and what quantize_nf4 makes of it, padded or not.
inline void check_survey(const Tensor& w, const Tensor& packed, const Tensor& scales, int64_t group_size) {
  constexpr auto op = "_survey_nf4";
  check_same_device(op, "packed", packed, "w", w);
  check_weight_dtype(op, w.scalar_type());
  check_packed(op, packed, scales, group_size);
  TORCH_CHECK_VALUE(w.dim() == 2, op, ": w must be 2-D (rows, columns), got ", w.dim(), "-D");
  SQUISH_CHECK_SIZE(w.sym_size(0).sym_eq(packed.sym_size(0)), op, ": w has ", w.sym_size(0), " rows but packed has ",
                    packed.sym_size(0));
  check_padding(op, "w has", w.sym_size(1), packed.sym_size(1) * 2, group_size);
}

inline const char* hint_for_activations(at::ScalarType dtype) {
  if (dtype == at::kByte)
    return "; if x was cast with x.to(next(model.parameters()).dtype): the first parameter may be packed NF4 bytes, "
           "name the dtype instead";
  if (dtype == at::kDouble)
    return "; there is no product in float64: model.float() undoes model.double(), or dequantize_model(model) comes "
           "first";
  return "";
}

inline void check_linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& bias,
                         int64_t group_size) {
  constexpr auto op = "linear_nf4";
  check_same_device(op, "packed", packed, "x", x);
  if (is_given(bias)) check_same_device(op, "bias", *bias, "x", x);
  check_compute_dtype(op, "x", x.scalar_type(), hint_for_activations(x.scalar_type()));
  check_packed(op, packed, scales, group_size);
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x must have at least one dimension, got a scalar");
  check_padding(op, "x has", x.sym_size(-1), packed.sym_size(1) * 2, group_size);
  if (!is_given(bias)) return;
  check_compute_dtype(op, "bias", bias->scalar_type(), hint_for_activations(bias->scalar_type()));
  TORCH_CHECK_VALUE(bias->dim() == 1, op, ": bias must be 1-D, got ", bias->dim(), "-D");
  SQUISH_CHECK_SIZE(bias->sym_size(0).sym_eq(packed.sym_size(0)), op, ": bias has ", bias->sym_size(0),
                    " elements but packed has ", packed.sym_size(0), " rows");
}

inline void check_linear_grad_x(const Tensor& dy, const Tensor& packed, const Tensor& scales, int64_t group_size,
                                const c10::SymInt& d) {
  constexpr auto op = "_linear_nf4_grad_x";
  check_same_device(op, "packed", packed, "dy", dy);
  check_compute_dtype(op, "dy", dy.scalar_type());
  check_packed(op, packed, scales, group_size);
  TORCH_CHECK_VALUE(dy.dim() >= 1, op, ": dy must have at least one dimension, got a scalar");
  SQUISH_CHECK_SIZE(dy.sym_size(-1).sym_eq(packed.sym_size(0)), op, ": dy has ", dy.sym_size(-1),
                    " columns but packed has ", packed.sym_size(0), " rows");
  check_padding(op, "d says", d, packed.sym_size(1) * 2, group_size);
}

// The shape of x or dy with its last dimension replaced.
inline c10::SymDimVector with_last_dim(const Tensor& x, c10::SymInt last) {
  c10::SymDimVector shape(x.sym_sizes().begin(), x.sym_sizes().end());
  shape.back() = std::move(last);
  return shape;
}

}  // namespace squish::ops
