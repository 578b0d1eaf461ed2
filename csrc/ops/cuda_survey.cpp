// _survey_nf4 on CUDA, to the bit what the CPU finds.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "csrc/cuda/kernels.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/cuda_launch.h"
#include "csrc/ops/readable.h"
#include "csrc/ops/storage_types.h"

namespace squish::ops {
namespace {

Tensor survey_nf4(const Tensor& weight, const Tensor& packed, const Tensor& scales, int64_t group_size) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_survey(weight, packed, scales, group_size);
  const c10::cuda::CUDAGuard device(weight.device());
  const Tensor w = readable_rows(weight);
  const Tensor bytes = readable(packed), scale = readable(scales);
  Tensor result = at::empty({w.size(0), 4}, w.options().dtype(at::kDouble));
  with_weight_type(w.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    check_launch("_survey_nf4",
                 cuda::survey(static_cast<const T*>(w.const_data_ptr()), w.size(0), w.size(1), w.stride(0),
                              bytes.const_data_ptr<uint8_t>(), scale.const_data_ptr<float>(), bytes.size(1), group_size,
                              result.mutable_data_ptr<double>(), c10::cuda::getCurrentCUDAStream().stream()));
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(squish, CUDA, m) { m.impl("_survey_nf4", &survey_nf4); }

}  // namespace squish::ops
