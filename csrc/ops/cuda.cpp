// The operators on CUDA: device guard, current stream, launch check. The linear decodes tiles of the weight into a
// small scratch and lets ATen multiply; no call ever holds a large weight whole.
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "csrc/cuda/kernels.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/storage_types.h"
#include "csrc/ops/weight_tiles.h"

namespace squish::ops {
namespace {

constexpr int64_t kTileBytes = int64_t{32} << 20;     // decoded weight in scratch
constexpr int64_t kProductBytes = int64_t{64} << 20;  // float32 products in scratch, before they are rounded

template <typename T>
void encode(const Tensor& w, int64_t group_size, const Tensor& packed, const Tensor& scales) {
  C10_CUDA_CHECK(cuda::quantize(static_cast<const T*>(w.const_data_ptr()), w.size(0), w.size(1), w.stride(0),
                                group_size, packed.mutable_data_ptr<uint8_t>(), scales.mutable_data_ptr<float>(),
                                c10::cuda::getCurrentCUDAStream().stream()));
}

std::tuple<Tensor, Tensor> quantize_nf4(const Tensor& weight, int64_t group_size) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_weight(weight, group_size);
  const c10::cuda::CUDAGuard device(weight.device());
  const Tensor w = weight.stride(1) == 1 ? weight : weight.contiguous();
  Tensor packed = at::empty({w.size(0), w.size(1) / 2}, w.options().dtype(at::kByte));
  Tensor scales = at::empty({w.size(0), w.size(1) / group_size}, w.options().dtype(at::kFloat));
  with_weight_type(w.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    encode<T>(w, group_size, packed, scales);
  });
  return {std::move(packed), std::move(scales)};
}

// Decodes rows [first, first + out.size(0)) of a contiguous packed matrix into `out`, contiguous.
void decode_rows(const Tensor& packed, const Tensor& scales, int64_t group_size, int64_t first, const Tensor& out) {
  const uint8_t* bytes = packed.const_data_ptr<uint8_t>() + first * packed.size(1);
  const float* scale = scales.const_data_ptr<float>() + first * scales.size(1);
  const auto stream = c10::cuda::getCurrentCUDAStream().stream();
  with_storage_type(out.scalar_type(), [&](auto zero) {
    auto* values = static_cast<decltype(zero)*>(out.mutable_data_ptr());
    C10_CUDA_CHECK(cuda::dequantize(bytes, scale, out.numel(), group_size, values, stream));
  });
}

Tensor dequantize_nf4(const Tensor& packed, const Tensor& scales, int64_t group_size,
                      std::optional<at::ScalarType> dtype) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_dequantize(packed, scales, group_size, dtype);
  const c10::cuda::CUDAGuard device(packed.device());
  Tensor out = at::empty({packed.size(0), packed.size(1) * 2}, packed.options().dtype(dtype.value_or(at::kFloat)));
  decode_rows(packed.contiguous(), scales.contiguous(), group_size, 0, out);
  return out;
}

Tensor& dequantize_nf4_out(const Tensor& packed, const Tensor& scales, int64_t group_size, Tensor& out) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_dequantize_out(packed, scales, group_size, out);
  at::assert_no_overlap(out, packed);
  at::assert_no_overlap(out, scales);
  const c10::cuda::CUDAGuard device(packed.device());
  decode_rows(packed.contiguous(), scales.contiguous(), group_size, 0, out);
  return out;
}

template <typename Use>
void for_each_tile(const Tensor& packed, const Tensor& scales, int64_t group_size, int64_t d, at::ScalarType dtype,
                   const Use& use) {
  const auto decode = [&](int64_t row, const Tensor& tile) { decode_rows(packed, scales, group_size, row, tile); };
  ops::for_each_tile(packed, d, dtype, kTileBytes, decode, use);
}

// a b in float32, whatever their dtype.
Tensor multiply(const Tensor& a, const Tensor& b) {
  if (a.size(1) == 0) return at::zeros({a.size(0), b.size(1)}, a.options().dtype(at::kFloat));
  return a.scalar_type() == at::kFloat ? at::mm(a, b) : at::mm(a, b, at::kFloat);
}

Tensor linear_nf4(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& bias,
                  int64_t group_size) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_linear(x, packed, scales, bias, group_size);
  const c10::cuda::CUDAGuard device(x.device());
  const int64_t n = packed.size(0), d = x.size(-1);
  Tensor result = at::empty(C10_AS_INTARRAYREF_SLOW(with_last_dim(x, n)), x.options());
  if (result.numel() == 0) return result;
  const int64_t m = result.numel() / n;
  const Tensor rows = x.reshape({m, d}), y = result.view({m, n});
  const Tensor bias32 = is_given(bias) ? bias->to(at::kFloat) : Tensor();
  for_each_tile(packed.contiguous(), scales.contiguous(), group_size, d, x.scalar_type(),
                [&](int64_t row, const Tensor& tile) {
                  const int64_t count = tile.size(0);
                  for_each_stretch_of_activations(m, count, kProductBytes, [&](int64_t first, int64_t stretch) {
                    Tensor product = multiply(rows.narrow(0, first, stretch), tile.t());
                    if (bias32.defined()) product.add_(bias32.narrow(0, row, count));
                    y.narrow(0, first, stretch).narrow(1, row, count).copy_(product);
                  });
                });
  return result;
}

// dx = dy W, accumulated in float32 over the tiles and rounded once.
Tensor linear_nf4_grad_x(const Tensor& dy, const Tensor& packed, const Tensor& scales, int64_t group_size, int64_t d) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_linear_grad_x(dy, packed, scales, group_size, d);
  const c10::cuda::CUDAGuard device(dy.device());
  const int64_t n = packed.size(0);
  const auto shape = with_last_dim(dy, d);
  if (n == 0) return at::zeros(C10_AS_INTARRAYREF_SLOW(shape), dy.options());
  Tensor result = at::empty(C10_AS_INTARRAYREF_SLOW(shape), dy.options());
  if (result.numel() == 0) return result;
  const int64_t m = dy.numel() / n;
  const Tensor rows = dy.reshape({m, n}), dx = result.view({m, d});
  const Tensor bytes = packed.contiguous(), scale = scales.contiguous();
  // Twice d floats for each: the sum, and the product that is added to it.
  for_each_stretch_of_activations(m, 2 * d, kProductBytes, [&](int64_t first, int64_t count) {
    const Tensor sum = at::zeros({count, d}, dy.options().dtype(at::kFloat));
    for_each_tile(bytes, scale, group_size, d, dy.scalar_type(), [&](int64_t row, const Tensor& tile) {
      sum.add_(multiply(rows.narrow(0, first, count).narrow(1, row, tile.size(0)), tile));
    });
    dx.narrow(0, first, count).copy_(sum);
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(squish, CUDA, m) {
  m.impl("quantize_nf4", &quantize_nf4);
  m.impl("dequantize_nf4", &dequantize_nf4);
  m.impl("dequantize_nf4.out", &dequantize_nf4_out);
  m.impl("linear_nf4", &linear_nf4);
  m.impl("_linear_nf4_grad_x", &linear_nf4_grad_x);
}

}  // namespace squish::ops
