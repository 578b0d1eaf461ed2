// The operators as typed calls through the dispatcher, for the kernels that pass a call on and for api.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <tuple>

namespace squish::ops {

using at::Tensor;

template <typename Signature>
auto find_operator(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

inline std::tuple<Tensor, Tensor> call_quantize(const Tensor& w, int64_t group_size) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, int64_t);
  static const auto op = find_operator<Signature>("squish::quantize_nf4");
  return op.call(w, group_size);
}

inline Tensor call_dequantize(const Tensor& packed, const Tensor& scales, int64_t group_size,
                              std::optional<at::ScalarType> dtype) {
  using Signature = Tensor(const Tensor&, const Tensor&, int64_t, std::optional<at::ScalarType>);
  static const auto op = find_operator<Signature>("squish::dequantize_nf4");
  return op.call(packed, scales, group_size, dtype);
}

inline Tensor call_linear(const Tensor& x, const Tensor& packed, const Tensor& scales,
                          const std::optional<Tensor>& bias, int64_t group_size) {
  using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, int64_t);
  static const auto op = find_operator<Signature>("squish::linear_nf4");
  return op.call(x, packed, scales, bias, group_size);
}

inline Tensor call_linear_grad_x(const Tensor& dy, const Tensor& packed, const Tensor& scales, int64_t group_size,
                                 c10::SymInt d) {
  using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, c10::SymInt);
  static const auto op = find_operator<Signature>("squish::_linear_nf4_grad_x");
  return op.call(dy, packed, scales, group_size, std::move(d));
}

inline Tensor& call_dequantize_out(const Tensor& packed, const Tensor& scales, int64_t group_size, Tensor& out) {
  using Signature = Tensor&(const Tensor&, const Tensor&, int64_t, Tensor&);
  static const auto op = find_operator<Signature>("squish::dequantize_nf4", "out");
  return op.call(packed, scales, group_size, out);
}

}  // namespace squish::ops
