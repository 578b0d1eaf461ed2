// quantize_nf4 and dequantize_nf4 on CUDA: device guard, current stream, launch check.
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "csrc/cuda/kernels.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/cuda_launch.h"
#include "csrc/ops/cuda_rows.h"
#include "csrc/ops/readable.h"
#include "csrc/ops/storage_types.h"

namespace squish::ops {
namespace {

template <typename T>
void encode(const Tensor& w, int64_t group_size, const Tensor& packed, const Tensor& scales) {
  check_launch("quantize_nf4",
               cuda::quantize(static_cast<const T*>(w.const_data_ptr()), w.size(0), w.size(1), w.stride(0), group_size,
                              packed.mutable_data_ptr<uint8_t>(), scales.mutable_data_ptr<float>(),
                              c10::cuda::getCurrentCUDAStream().stream()));
}

std::tuple<Tensor, Tensor> quantize_nf4(const Tensor& weight, int64_t group_size) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_weight(weight, group_size);
  const c10::cuda::CUDAGuard device(weight.device());
  const Tensor w = readable_rows(weight);
  Tensor packed = at::empty({w.size(0), w.size(1) / 2}, w.options().dtype(at::kByte));
  Tensor scales = at::empty({w.size(0), w.size(1) / group_size}, w.options().dtype(at::kFloat));
  with_weight_type(w.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    encode<T>(w, group_size, packed, scales);
  });
  return {std::move(packed), std::move(scales)};
}

Tensor dequantize_nf4(const Tensor& packed, const Tensor& scales, int64_t group_size,
                      std::optional<at::ScalarType> dtype) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_dequantize(packed, scales, group_size, dtype);
  const c10::cuda::CUDAGuard device(packed.device());
  Tensor out = at::empty({packed.size(0), packed.size(1) * 2}, packed.options().dtype(dtype.value_or(at::kFloat)));
  decode_rows_cuda("dequantize_nf4", readable(packed), readable(scales), group_size, 0, out);
  return out;
}

Tensor& dequantize_nf4_out(const Tensor& packed, const Tensor& scales, int64_t group_size, Tensor& out) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_dequantize_out(packed, scales, group_size, out);
  check_aligned("dequantize_nf4", "out", out);
  at::assert_no_overlap(out, packed);
  at::assert_no_overlap(out, scales);
  const c10::cuda::CUDAGuard device(packed.device());
  decode_rows_cuda("dequantize_nf4", readable(packed), readable(scales), group_size, 0, out);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(squish, CUDA, m) {
  m.impl("quantize_nf4", &quantize_nf4);
  m.impl("dequantize_nf4", &dequantize_nf4);
  m.impl("dequantize_nf4.out", &dequantize_nf4_out);
}

}  // namespace squish::ops
