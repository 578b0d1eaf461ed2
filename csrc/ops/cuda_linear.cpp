// linear_nf4 and its gradient on CUDA: tiles of the weight are decoded into a small scratch, and ATen multiplies; no
// call ever holds a large weight whole.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "csrc/cuda/kernels.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/cuda_rows.h"
#include "csrc/ops/weight_tiles.h"

namespace squish::ops {
namespace {

constexpr int64_t kTileBytes = int64_t{32} << 20;     // decoded weight in scratch
constexpr int64_t kProductBytes = int64_t{64} << 20;  // float32 products in scratch, before they are rounded

template <typename Use>
void for_each_tile(const Tensor& packed, const Tensor& scales, int64_t group_size, int64_t d, at::ScalarType dtype,
                   const Use& use) {
  const auto decode = [&](int64_t row, const Tensor& tile) { decode_rows_cuda(packed, scales, group_size, row, tile); };
  ops::for_each_tile(packed, d, dtype, kTileBytes, decode, use);
}

// a b in float32, whatever their dtype.
Tensor multiply(const Tensor& a, const Tensor& b) {
  if (a.size(1) == 0) return at::zeros({a.size(0), b.size(1)}, a.options().dtype(at::kFloat));
  return a.scalar_type() == at::kFloat ? at::mm(a, b) : at::mm(a, b, at::kFloat);
}

bool is_aligned(const Tensor& tensor, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

// rows as the kernel for few activations wants them: as wide as the weight (zeros meet its padding), and aligned.
Tensor as_wide_as(int64_t columns, const Tensor& rows) {
  if (rows.size(1) != columns) return at::constant_pad_nd(rows, {0, columns - rows.size(1)});
  const Tensor contiguous = rows.contiguous();
  return is_aligned(contiguous, 16) ? contiguous : contiguous.clone();
}

// The product on the packed weight itself, for few activations of 16 bits. False if no kernel takes these arguments.
bool multiply_few(const Tensor& rows, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& bias,
                  int64_t group_size, const Tensor& y) {
  const int64_t m = rows.size(0), n = packed.size(0), columns = packed.size(1) * 2;
  if (rows.scalar_type() == at::kFloat || !cuda::linear_few_takes(m, n, columns, group_size)) return false;
  if (!is_aligned(packed, 16) || !is_aligned(scales, 8)) return false;
  const Tensor x = as_wide_as(columns, rows);
  const bool same = is_given(bias) && bias->scalar_type() == x.scalar_type();
  const Tensor own_bias = is_given(bias) ? bias->contiguous() : Tensor();
  const Tensor bias32 = is_given(bias) && !same ? own_bias.to(at::kFloat) : Tensor();
  const auto stream = c10::cuda::getCurrentCUDAStream().stream();
  const auto launch = [&](auto zero) {
    using T = decltype(zero);
    C10_CUDA_CHECK(cuda::linear_few(static_cast<const T*>(x.const_data_ptr()), packed.const_data_ptr<uint8_t>(),
                                    scales.const_data_ptr<float>(),
                                    same ? static_cast<const T*>(own_bias.const_data_ptr()) : nullptr,
                                    bias32.defined() ? bias32.const_data_ptr<float>() : nullptr,
                                    static_cast<T*>(y.mutable_data_ptr()), m, n, columns, group_size, stream));
  };
  if (x.scalar_type() == at::kBFloat16) {
    launch(nf4::BFloat16{});
  } else {
    launch(nf4::Float16{});
  }
  return true;
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
  const Tensor bytes = packed.contiguous(), scale = scales.contiguous();
  if (multiply_few(rows, bytes, scale, bias, group_size, y)) return result;
  const Tensor bias32 = is_given(bias) ? bias->to(at::kFloat) : Tensor();
  for_each_tile(bytes, scale, group_size, d, x.scalar_type(), [&](int64_t row, const Tensor& tile) {
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
  m.impl("linear_nf4", &linear_nf4);
  m.impl("_linear_nf4_grad_x", &linear_nf4_grad_x);
}

}  // namespace squish::ops
