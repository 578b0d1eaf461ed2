// Under autocast x follows the autocast dtype; packed, scales and bias stay as they are.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "csrc/ops/calls.h"

namespace squish::ops {
namespace {

template <c10::DeviceType kDevice, c10::DispatchKey kKey>
Tensor linear_nf4(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& bias,
                  int64_t group_size) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
  const auto dtype = at::autocast::get_autocast_dtype(kDevice);
  return call_linear(at::autocast::cached_cast(dtype, x, kDevice), packed, scales, bias, group_size);
}

}  // namespace

TORCH_LIBRARY_IMPL(squish, AutocastCPU, m) {
  m.impl("linear_nf4", &linear_nf4<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}
TORCH_LIBRARY_IMPL(squish, AutocastCUDA, m) {
  m.impl("linear_nf4", &linear_nf4<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace squish::ops
