// linear_nf4 and its gradient on the CPU. Our own kernels read the packed bytes, and a decoded weight lives in
// registers or in scratch of a quarter of a megabyte. ATen multiplies tiles of the decoded weight where it is faster:
// for many bfloat16 activations on processors that multiply bfloat16, and for the gradient.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include "csrc/cpu/dispatch.h"
#include "csrc/cpu/tiles.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/cpu_matrix.h"
#include "csrc/ops/readable.h"
#include "csrc/ops/weight_tiles.h"

namespace squish::ops {
namespace {

constexpr int64_t kActivationBytes = int64_t{8} << 20;  // packed activations in scratch
constexpr int64_t kMostActivations = 4096;              // of which a thread holds the sums of some rows
constexpr int64_t kTileBytes = int64_t{4} << 20;        // decoded weight in scratch, for the gradient
constexpr int64_t kMultipliesPerThread = 16384;         // below this a second thread costs more than it saves

// y = x W^T + bias, by the kernels of one type of product. x: (m, d), its columns neighbours. y: (m, n), contiguous.
template <typename Element, typename T>
void linear_by(const cpu::LinearKernels<Element>& kernels, const Tensor& x, const Tensor& packed, const Tensor& scales,
               const float* bias, int64_t group_size, const Tensor& y) {
  const int64_t m = x.size(0), d = x.size(1), n = packed.size(0), columns = packed.size(1) * 2;
  const int64_t padded = cpu::packed_elements(kernels, columns);
  const int64_t bytes = std::max<int64_t>(padded, 1) * int64_t{sizeof(Element)};
  // Stretches whose lengths differ by one at most, and that may be two blocks long: so none is as few activations as
  // are summed in another order.
  const int64_t most = std::clamp(kActivationBytes / bytes, 2 * kernels.block, kMostActivations);
  const int64_t stretches = (m + most - 1) / most;
  const at::DataPtr scratch = c10::GetCPUAllocator()->allocate(std::min(m, most) * bytes);
  Element* activations = static_cast<Element*>(scratch.get());
  const T* values = static_cast<const T*>(x.const_data_ptr());
  T* out = static_cast<T*>(y.mutable_data_ptr());
  for (int64_t stretch = 0; stretch < stretches; ++stretch) {
    const int64_t first = stretch * m / stretches, count = (stretch + 1) * m / stretches - first;
    const cpu::Tiles blocks = cpu::blocks_of(count, kernels.block);
    const int64_t work = std::max<int64_t>(1, blocks.rows * padded);
    parallel_for(0, blocks.count, std::max<int64_t>(1, kMultipliesPerThread / work), [&](int64_t begin, int64_t end) {
      const cpu::DefaultFloatEnvironment environment;
      cpu::pack_activations(kernels, values + first * x.stride(0), count, d, x.stride(0), columns, begin, end,
                            activations);
    });
    const cpu::LinearTask<Element, T> task{.kernels = kernels,
                                           .packed = packed.const_data_ptr<uint8_t>(),
                                           .scales = scales.const_data_ptr<float>(),
                                           .columns = columns,
                                           .group_size = group_size,
                                           .x = activations,
                                           .m = count,
                                           .bias = bias,
                                           .y = out + first * n,
                                           .y_stride = n};
    parallel_for(0, n, std::max<int64_t>(1, kMultipliesPerThread / std::max<int64_t>(columns * count, 1)),
                 [&](int64_t begin, int64_t end) {
                   const cpu::DefaultFloatEnvironment environment;
                   const at::DataPtr own = c10::GetCPUAllocator()->allocate(cpu::linear_scratch_bytes<Element>(count));
                   cpu::linear_rows(task, begin, end, own.get());
                 });
  }
}

// The same in bfloat16 by ATen, which has AMX where the processor has it, on tiles of the decoded weight.
void linear_by_aten(const cpu::Path& path, const Tensor& x, const Tensor& packed, const Tensor& scales,
                    const Tensor& bias, int64_t group_size, const Tensor& y) {
  const auto decode = [&](int64_t row, const Tensor& tile) {
    const int64_t rows = tile.size(0);
    decode_matrix(path, packed.narrow(0, row, rows), scales.narrow(0, row, rows), group_size, tile);
  };
  for_each_tile(packed, x.size(1), x.scalar_type(), kTileBytes, decode, [&](int64_t row, const Tensor& tile) {
    Tensor part = y.narrow(1, row, tile.size(0));
    if (bias.defined()) {
      at::addmm_out(part, bias.narrow(0, row, tile.size(0)), x, tile.t());
    } else {
      at::mm_out(part, x, tile.t());
    }
  });
}

// ATen adds a bias in its own dtype, and has to be clearly faster to be worth another order of summation: with AMX it
// is; without, from some point on it makes no difference (docs/benchmarks), and the route stays tested everywhere.
bool aten_is_faster(const cpu::Path& path, const Tensor& x, const Tensor& bias, int64_t m) {
  return x.scalar_type() == at::kBFloat16 && path.linear_bfloat16 != nullptr &&
         (!bias.defined() || bias.scalar_type() == at::kBFloat16) && m >= (cpu::selection().has_amx ? 32 : 4096);
}

// Whether the kernels can compute this, and about as well as in T.
template <typename T>
bool int16_suits(const cpu::Path& path, const Tensor& x, const Tensor& packed, int64_t group_size) {
  const cpu::LinearKernels<int16_t>* kernels = path.linear_int16;
  if (kernels == nullptr || !kernels->takes(x.size(0), packed.size(1) * 2, group_size)) return false;
  const T* values = static_cast<const T*>(x.const_data_ptr());
  const cpu::DefaultFloatEnvironment environment;
  return std::get<cpu::Activations<T, int16_t>>(kernels->activations).suit(values, x.size(0), x.size(1), x.stride(0));
}

// y by the fastest kernels that this processor has for T, m and these groups.
template <typename T>
void linear_by_the_fastest(const cpu::Path& path, const Tensor& x, const Tensor& packed, const Tensor& scales,
                           const float* bias, int64_t group_size, const Tensor& y) {
  if constexpr (std::is_same_v<T, nf4::BFloat16>)
    if (path.linear_bfloat16 != nullptr)
      return linear_by<T, T>(*path.linear_bfloat16, x, packed, scales, bias, group_size, y);
  if constexpr (!std::is_same_v<T, float>)
    if (int16_suits<T>(path, x, packed, group_size))
      return linear_by<int16_t, T>(*path.linear_int16, x, packed, scales, bias, group_size, y);
  linear_by<float, T>(*path.linear, x, packed, scales, bias, group_size, y);
}

Tensor linear_nf4(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& bias,
                  int64_t group_size) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_linear(x, packed, scales, bias, group_size);
  const int64_t n = packed.size(0), d = x.size(-1);
  Tensor result = at::empty(C10_AS_INTARRAYREF_SLOW(with_last_dim(x, n)), x.options());
  if (result.numel() == 0) return result;
  const cpu::Path& path = selected();
  const int64_t m = result.numel() / n;
  const Tensor rows = x.reshape({m, d}), y = result.view({m, n});
  const Tensor activations = readable_rows(rows);
  const Tensor bytes = readable(packed), scale = readable(scales);
  const Tensor given_bias = is_given(bias) ? *bias : Tensor();
  if (aten_is_faster(path, x, given_bias, m)) {
    linear_by_aten(path, activations, bytes, scale, given_bias, group_size, y);
    return result;
  }
  const Tensor bias32 = given_bias.defined() ? readable(given_bias).to(at::kFloat) : Tensor();
  const float* bias_values = bias32.defined() ? bias32.const_data_ptr<float>() : nullptr;
  with_storage_type(x.scalar_type(), [&](auto zero) {
    linear_by_the_fastest<decltype(zero)>(path, activations, bytes, scale, bias_values, group_size, y);
  });
  return result;
}

// dx = dy W by tiles of W's columns, which ATen multiplies: each sum is accumulated in float32 and rounded once.
void grad_x_by_tiles(const cpu::Path& path, const Tensor& dy, const Tensor& packed, const Tensor& scales,
                     int64_t group_size, const Tensor& dx) {
  const int64_t n = packed.size(0), columns = packed.size(1) * 2, d = dx.size(1);
  const int64_t bytes = n * int64_t{2} * static_cast<int64_t>(dy.element_size());  // of two columns
  const int64_t width = std::clamp<int64_t>(kTileBytes / bytes, 1, columns / 2) * 2;
  const Tensor scratch = at::empty({n * width}, dy.options());
  for (int64_t first = 0; first < d; first += width) {
    const int64_t count = std::min(width, columns - first);
    const Tensor tile = scratch.narrow(0, 0, n * count).view({n, count});
    decode_column_tile(path, packed, scales, group_size, first, tile);
    const int64_t wanted = std::min(count, d - first);  // without the padding
    Tensor part = dx.narrow(1, first, wanted);
    at::mm_out(part, dy, tile.narrow(1, 0, wanted));
  }
}

Tensor linear_nf4_grad_x(const Tensor& dy, const Tensor& packed, const Tensor& scales, int64_t group_size, int64_t d) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_linear_grad_x(dy, packed, scales, group_size, d);
  const int64_t n = packed.size(0);
  const auto shape = with_last_dim(dy, d);
  if (n == 0) return at::zeros(C10_AS_INTARRAYREF_SLOW(shape), dy.options());
  Tensor result = at::empty(C10_AS_INTARRAYREF_SLOW(shape), dy.options());
  if (result.numel() == 0) return result;
  const cpu::Path& path = selected();
  const int64_t m = dy.numel() / n;
  const Tensor rows = dy.reshape({m, n}), dx = result.view({m, d});
  const Tensor bytes = readable(packed), scale = readable(scales);
  if (dy.scalar_type() == at::kFloat || (dy.scalar_type() == at::kBFloat16 && path.linear_bfloat16 != nullptr)) {
    grad_x_by_tiles(path, rows, bytes, scale, group_size, dx);
    return result;
  }
  for_each_stretch_of_activations(m, d + n, kActivationBytes, [&](int64_t first, int64_t count) {
    const Tensor dy32 = rows.narrow(0, first, count).to(at::kFloat);
    const Tensor dx32 = at::empty({count, d}, dy32.options());
    grad_x_by_tiles(path, dy32, bytes, scale, group_size, dx32);
    dx.narrow(0, first, count).copy_(dx32);
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(squish, CPU, m) {
  m.impl("linear_nf4", &linear_nf4);
  m.impl("_linear_nf4_grad_x", &linear_nf4_grad_x);
}

}  // namespace squish::ops
