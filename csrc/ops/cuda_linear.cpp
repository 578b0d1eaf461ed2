// linear_nf4 and its gradient on CUDA. Few activations are multiplied on the packed weight (multiply_few): on tensor
// cores where type and shape allow, else, if they are very few, without. Otherwise tiles of the weight are decoded into
// scratch of bounded size, and ATen multiplies.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "csrc/cuda/kernels.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/cuda_launch.h"
#include "csrc/ops/cuda_rows.h"
#include "csrc/ops/readable.h"
#include "csrc/ops/storage_types.h"
#include "csrc/ops/weight_tiles.h"

namespace squish::ops {
namespace {

constexpr int64_t kTileBytes = int64_t{128} << 20;    // decoded weight in scratch: most layers whole
constexpr int64_t kProductBytes = int64_t{64} << 20;  // float32 products in scratch, before they are rounded

template <typename Use>
void for_each_tile(const char* op, const Tensor& packed, const Tensor& scales, int64_t group_size, int64_t d,
                   at::ScalarType dtype, const Use& use) {
  const auto decode = [&](int64_t row, const Tensor& tile) {
    decode_rows_cuda(op, packed, scales, group_size, row, tile);
  };
  ops::for_each_tile(packed, d, dtype, kTileBytes, decode, use);
}

// out = a b + addend, if there is one. Float32 products of more than kChain terms are added in parts: a library adds in
// one chain, and with 4096 terms its error is above 1e-6.
void multiply_add(const Tensor& a, const Tensor& b, const Tensor& addend, const Tensor& out) {
  constexpr int64_t kChain = 2048;
  const int64_t terms = a.size(1), chain = a.scalar_type() == at::kFloat ? kChain : terms;
  Tensor sum = out;
  for (int64_t first = 0; first < terms; first += chain) {
    const int64_t count = std::min(chain, terms - first);
    const Tensor left = a.narrow(1, first, count), right = b.narrow(0, first, count);
    if (first > 0) {
      at::addmm_out(sum, sum, left, right);
    } else if (addend.defined()) {
      at::addmm_out(sum, addend, left, right);
    } else {
      at::mm_out(sum, left, right);
    }
  }
}

// a b in float32, whatever their dtype.
Tensor multiply(const Tensor& a, const Tensor& b) {
  if (a.size(1) == 0) return at::zeros({a.size(0), b.size(1)}, a.options().dtype(at::kFloat));
  if (a.scalar_type() != at::kFloat) return at::mm(a, b, at::kFloat);
  Tensor product = at::empty({a.size(0), b.size(1)}, a.options());
  multiply_add(a, b, Tensor(), product);
  return product;
}

template <typename T>
const T* data_of(const Tensor& tensor) {
  return tensor.defined() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
}

// The product on the packed weight itself, for few activations. False if no kernel takes these arguments.
bool multiply_few(const Tensor& rows, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& bias,
                  int64_t group_size, const Tensor& y) {
  bool taken = false;
  with_storage_type(rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    cuda::FewActivations<T> call{.packed = data_of<uint8_t>(packed),
                                 .scales = data_of<float>(scales),
                                 .y = static_cast<T*>(y.mutable_data_ptr()),
                                 .m = rows.size(0),
                                 .n = packed.size(0),
                                 .d = packed.size(1) * 2,
                                 .x_columns = rows.size(1),
                                 .group_size = group_size};
    taken = cuda::linear_takes(call);
    if (!taken) return;
    const Tensor x = readable_rows(rows);
    call.x = data_of<T>(x), call.x_stride = x.stride(0);
    const Tensor any_bias = is_given(bias) ? readable(*bias) : Tensor();
    const bool same = any_bias.defined() && any_bias.scalar_type() == x.scalar_type();
    const Tensor bias32 = any_bias.defined() && !same ? any_bias.to(at::kFloat) : Tensor();
    call.bias = same ? data_of<T>(any_bias) : nullptr, call.bias32 = data_of<float>(bias32);
    const int64_t size = cuda::linear_scratch(call);
    const Tensor scratch = size > 0 ? at::empty({size}, x.options()) : Tensor();
    if (size > 0) call.scratch = scratch.mutable_data_ptr();
    check_launch("linear_nf4", cuda::linear(call, c10::cuda::getCurrentCUDAStream().stream()));
  });
  return taken;
}

// Whether a product of rows x columns has tiles enough for every multiprocessor. If not, a library may split the sum
// among several, and may round their parts to 16 bits; then we ask it for float32, and round ourselves.
bool fills_the_gpu(int64_t rows, int64_t columns) {
  const auto tiles = [](int64_t size) { return (size + 127) / 128; };
  return 4 * tiles(rows) * tiles(columns) >= 3 * cuda::multiprocessors();
}

// y = x W' + bias for some rows of the weight, which are columns of y, and the same of the bias.
void multiply_into(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& y) {
  const bool same = !bias.defined() || bias.scalar_type() == x.scalar_type();
  if (x.size(1) == 0 || !same || !fills_the_gpu(x.size(0), weight.size(0))) {
    const Tensor product = multiply(x, weight.t());
    if (bias.defined()) product.add_(bias);
    y.copy_(product);
  } else {
    multiply_add(x, weight.t(), bias, y);
  }
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
  const Tensor bytes = readable(packed), scale = readable(scales);
  if (multiply_few(rows, bytes, scale, bias, group_size, y)) return result;
  const Tensor any_bias = is_given(bias) ? *bias : Tensor();
  for_each_tile("linear_nf4", bytes, scale, group_size, d, x.scalar_type(), [&](int64_t row, const Tensor& tile) {
    const int64_t count = tile.size(0);
    const Tensor of_tile = any_bias.defined() ? any_bias.narrow(0, row, count) : any_bias;
    for_each_stretch_of_activations(m, count, kProductBytes, [&](int64_t first, int64_t stretch) {
      multiply_into(rows.narrow(0, first, stretch), tile, of_tile, y.narrow(0, first, stretch).narrow(1, row, count));
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
  const Tensor bytes = readable(packed), scale = readable(scales);
  // A weight that is one tile needs no sum over tiles.
  const bool whole = bytes.numel() * 2 * dy.element_size() <= kTileBytes && fills_the_gpu(m, d);
  // Twice d floats for each: the sum, and the product that is added to it.
  for_each_stretch_of_activations(m, 2 * d, kProductBytes, [&](int64_t first, int64_t count) {
    Tensor out = dx.narrow(0, first, count);
    const Tensor sum = whole ? Tensor() : at::zeros({count, d}, dy.options().dtype(at::kFloat));
    for_each_tile("_linear_nf4_grad_x", bytes, scale, group_size, d, dy.scalar_type(),
                  [&](int64_t row, const Tensor& tile) {
                    if (whole) {
                      multiply_add(rows.narrow(0, first, count), tile, Tensor(), out);
                      return;
                    }
                    sum.add_(multiply(rows.narrow(0, first, count).narrow(1, row, tile.size(0)), tile));
                  });
    if (!whole) out.copy_(sum);
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(squish, CUDA, m) {
  m.impl("linear_nf4", &linear_nf4);
  m.impl("_linear_nf4_grad_x", &linear_nf4_grad_x);
}

}  // namespace squish::ops
