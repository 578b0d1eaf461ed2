// linear_nf4 and its gradient on the CPU. Few activations: our fused kernel reads the packed bytes and stores no
// weight. Many: tiles of the weight are decoded into a small scratch, and ATen multiplies.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "csrc/cpu/activations.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/cpu_rows.h"
#include "csrc/ops/weight_tiles.h"

namespace squish::ops {
namespace {

// Up to this many activations the fused kernel is faster than decoding tiles for ATen, by benchmarks/linear.py. The
// order of summation changes there, so docs/numerics.md states them.
constexpr int64_t kFusedActivations = 64;
constexpr int64_t kFusedActivationsBFloat16 = 6;         // where the processor multiplies bfloat16 itself
constexpr int64_t kTileBytes = int64_t{4} << 20;         // decoded weight in scratch
constexpr int64_t kActivationBytes = int64_t{16} << 20;  // float32 copies of 16-bit activations in scratch

// A packed weight and one call's sizes. x: (m, d). The weight: (n, columns), columns >= d.
struct Problem {
  const Tensor packed, scales;
  int64_t group_size, m, n, d, columns;
  const cpu::Selection& path;
};

Tensor as_float32(const std::optional<Tensor>& bias) {
  return is_given(bias) ? bias->contiguous().to(at::kFloat) : Tensor();
}

void fused_linear(const Problem& p, const Tensor& x, const Tensor& bias, const Tensor& y) {
  constexpr int64_t kRowsAtOnce = 32;  // they stay in the first-level cache while the activations pass
  const Tensor split = at::empty({p.m, p.columns}, x.options().dtype(at::kFloat));
  float* activations = split.mutable_data_ptr<float>();
  const uint8_t* packed = p.packed.const_data_ptr<uint8_t>();
  const float* scales = p.scales.const_data_ptr<float>();
  const float* bias_values = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  with_storage_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    {
      const cpu::DefaultFloatEnvironment environment;
      const T* values = static_cast<const T*>(x.const_data_ptr());
      for (int64_t i = 0; i < p.m; i += cpu::kLinearBatch)
        cpu::split_columns(values + i * x.stride(0), std::min(cpu::kLinearBatch, p.m - i), p.d, x.stride(0), p.columns,
                           p.group_size, activations + i * p.columns);
    }
    T* out = static_cast<T*>(y.mutable_data_ptr());
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(p.columns, 1));
    parallel_for(0, p.n, grain, [&](int64_t begin, int64_t end) {
      const cpu::DefaultFloatEnvironment environment;
      float sums[kRowsAtOnce * cpu::kLinearBatch];
      for (int64_t row = begin; row < end; row += kRowsAtOnce) {
        const int64_t rows = std::min(kRowsAtOnce, end - row);
        for (int64_t i = 0; i < p.m; i += cpu::kLinearBatch) {
          const int64_t batch = std::min(cpu::kLinearBatch, p.m - i);
          p.path.kernels->linear_rows(packed + row * (p.columns / 2), scales + row * (p.columns / p.group_size), rows,
                                      p.columns, p.group_size, activations + i * p.columns, batch, sums);
          cpu::add_bias(sums, bias_values == nullptr ? nullptr : bias_values + row, rows, batch, p.n,
                        out + i * p.n + row);
        }
      }
    });
  });
}

template <typename Use>
void for_each_tile(const Problem& p, at::ScalarType dtype, const Use& use) {
  const auto decode = [&](int64_t row, const Tensor& tile) {
    decode_rows(*p.path.kernels, p.packed, p.scales, p.group_size, row, tile);
  };
  ops::for_each_tile(p.packed, p.d, dtype, kTileBytes, decode, use);
}

// y = x W^T + bias, where x, W and the bias have one dtype in which ATen accumulates in float32 and rounds once.
void tiled_linear(const Problem& p, const Tensor& x, const Tensor& bias, const Tensor& y) {
  for_each_tile(p, x.scalar_type(), [&](int64_t row, const Tensor& tile) {
    Tensor part = y.narrow(1, row, tile.size(0));
    if (bias.defined()) {
      at::addmm_out(part, bias.narrow(0, row, tile.size(0)), x, tile.t());
    } else {
      at::mm_out(part, x, tile.t());
    }
  });
}

// bfloat16 that the processor multiplies itself; elsewhere, and for a bias that bfloat16 cannot hold, float32 is used.
bool multiplies_in_own_dtype(const Problem& p, const Tensor& x, const std::optional<Tensor>& bias) {
  if (x.scalar_type() == at::kFloat) return true;
  return x.scalar_type() == at::kBFloat16 && p.path.isa >= cpu::Isa::kAvx512Bf16 &&
         (!is_given(bias) || bias->scalar_type() == at::kBFloat16);
}

Tensor linear_nf4(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& bias,
                  int64_t group_size) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_linear(x, packed, scales, bias, group_size);
  const int64_t n = packed.size(0), d = x.size(-1);
  Tensor result = at::empty(C10_AS_INTARRAYREF_SLOW(with_last_dim(x, n)), x.options());
  if (result.numel() == 0) return result;
  const Problem p{packed.contiguous(), scales.contiguous(), group_size, result.numel() / n, n, d,
                  packed.size(1) * 2,  selected()};
  const Tensor rows = x.reshape({p.m, d});
  const Tensor y = result.view({p.m, n});
  const bool own_dtype = multiplies_in_own_dtype(p, x, bias);
  const bool own_bfloat16 = own_dtype && x.scalar_type() == at::kBFloat16;
  if (p.m <= (own_bfloat16 ? kFusedActivationsBFloat16 : kFusedActivations) && group_size % 2 == 0) {
    fused_linear(p, rows.stride(1) == 1 ? rows : rows.contiguous(), as_float32(bias), y);
  } else if (own_dtype) {
    tiled_linear(p, rows, is_given(bias) ? bias->to(x.scalar_type()) : Tensor(), y);
  } else {
    const Tensor bias32 = as_float32(bias);
    for_each_stretch_of_activations(p.m, d + n, kActivationBytes, [&](int64_t first, int64_t count) {
      const Tensor x32 = rows.narrow(0, first, count).to(at::kFloat);
      const Tensor y32 = at::empty({count, n}, x32.options());
      tiled_linear(p, x32, bias32, y32);
      y.narrow(0, first, count).copy_(y32);
    });
  }
  return result;
}

// dx = dy W, accumulated in float32 over the tiles and rounded once.
Tensor linear_nf4_grad_x(const Tensor& dy, const Tensor& packed, const Tensor& scales, int64_t group_size, int64_t d) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_linear_grad_x(dy, packed, scales, group_size, d);
  const int64_t n = packed.size(0);
  const auto shape = with_last_dim(dy, d);
  if (n == 0) return at::zeros(C10_AS_INTARRAYREF_SLOW(shape), dy.options());
  Tensor result = at::empty(C10_AS_INTARRAYREF_SLOW(shape), dy.options());
  if (result.numel() == 0) return result;
  const Problem p{packed.contiguous(), scales.contiguous(), group_size, dy.numel() / n, n, d,
                  packed.size(1) * 2,  selected()};
  const Tensor rows = dy.reshape({p.m, n});
  const Tensor dx = result.view({p.m, d});
  for_each_stretch_of_activations(p.m, d + n, kActivationBytes, [&](int64_t first, int64_t count) {
    const Tensor dy32 = rows.narrow(0, first, count).to(at::kFloat);
    Tensor sum = at::zeros({count, d}, dy32.options());
    for_each_tile(p, at::kFloat,
                  [&](int64_t row, const Tensor& tile) { sum.addmm_(dy32.narrow(1, row, tile.size(0)), tile); });
    dx.narrow(0, first, count).copy_(sum);
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(squish, CPU, m) {
  m.impl("linear_nf4", &linear_nf4);
  m.impl("_linear_nf4_grad_x", &linear_nf4_grad_x);
}

}  // namespace squish::ops
