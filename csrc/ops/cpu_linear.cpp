// linear_nf4 and its gradient on the CPU. The layer is our own kernels at every size: they read the packed bytes, and a
// decoded weight lives in registers or in scratch of a quarter of a megabyte.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <cmath>

#include "csrc/cpu/linear.h"
#include "csrc/cpu/tiles.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/cpu_matrix.h"
#include "csrc/ops/weight_tiles.h"

namespace squish::ops {
namespace {

constexpr int64_t kActivationBytes = int64_t{8} << 20;  // packed activations in scratch
constexpr int64_t kMostActivations = 4096;              // of which a thread holds the sums of some rows
constexpr int64_t kTileBytes = int64_t{4} << 20;        // decoded weight in scratch, for the gradient
constexpr int64_t kMultipliesPerThread = 16384;         // below this a second thread costs more than it saves

// y = x W^T + bias, by the kernels of one type of product. x: (m, d), its columns neighbours. y: (m, n), contiguous.
template <typename Element, typename T>
void multiply(const cpu::LinearKernels<Element>& kernels, const Tensor& x, const Tensor& packed, const Tensor& scales,
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
    const cpu::LinearTask<Element, T> task{kernels,
                                           packed.const_data_ptr<uint8_t>(),
                                           scales.const_data_ptr<float>(),
                                           columns,
                                           group_size,
                                           activations,
                                           count,
                                           bias,
                                           out + first * n,
                                           n};
    parallel_for(0, n, std::max<int64_t>(1, kMultipliesPerThread / std::max<int64_t>(columns * count, 1)),
                 [&](int64_t begin, int64_t end) {
                   const cpu::DefaultFloatEnvironment environment;
                   const at::DataPtr own = c10::GetCPUAllocator()->allocate(cpu::linear_scratch_bytes<Element>(count));
                   cpu::linear_rows(task, begin, end, own.get());
                 });
  }
}

// The same in bfloat16 by ATen, which has AMX where the processor has it, on tiles of the decoded weight.
void multiply_by_aten(const cpu::Kernels& kernels, const Tensor& x, const Tensor& packed, const Tensor& scales,
                      const Tensor& bias, int64_t group_size, const Tensor& y) {
  const auto decode = [&](int64_t row, const Tensor& tile) {
    const int64_t rows = tile.size(0);
    decode_matrix(kernels, packed.narrow(0, row, rows), scales.narrow(0, row, rows), group_size, tile);
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
bool aten_multiplies(const cpu::Path& path, const Tensor& x, const Tensor& bias, int64_t m) {
  return x.scalar_type() == at::kBFloat16 && path.linear_bfloat16 != nullptr &&
         (!bias.defined() || bias.scalar_type() == at::kBFloat16) && m >= (cpu::selection().has_amx ? 32 : 4096);
}

// Whether integers of 14 bits hold these activations about as well as T does: they are units of the largest magnitude
// of 64 columns, so no outlier may stand far above the others; nor may the unit leave the range of float32.
template <typename T>
bool suit_int16(const Tensor& x) {
  constexpr float kMostOverMean = std::is_same_v<T, nf4::Float16> ? 8 : 16;
  constexpr int64_t kColumns = 64;
  const T* values = static_cast<const T*>(x.const_data_ptr());
  for (int64_t row = 0; row < x.size(0); ++row)
    for (int64_t first = 0; first < x.size(1); first += kColumns) {
      const int64_t count = std::min(kColumns, x.size(1) - first);
      float largest = 0, sum = 0;
      for (int64_t i = 0; i < count; ++i) {
        const float magnitude = std::fabs(nf4::to_float(values[row * x.stride(0) + first + i]));
        largest = std::max(largest, magnitude);
        sum += magnitude;
      }
      const bool even = largest * static_cast<float>(count) <= kMostOverMean * sum;  // false for infinity and NaN
      if (!(sum == 0 || (even && largest >= 0x1p-90f && sum < INFINITY))) return false;
    }
  return true;
}

// y by the fastest kernels that this processor has for T, m and these groups.
template <typename T>
void multiply_in_the_fastest_type(const cpu::Path& path, const Tensor& x, const Tensor& packed, const Tensor& scales,
                                  const float* bias, int64_t group_size, const Tensor& y) {
  if constexpr (std::is_same_v<T, nf4::BFloat16>)
    if (path.linear_bfloat16 != nullptr)
      return multiply<T, T>(*path.linear_bfloat16, x, packed, scales, bias, group_size, y);
  if constexpr (!std::is_same_v<T, float>)
    if (x.size(0) <= cpu::kMostInt16Activations && path.linear_int16 != nullptr &&
        path.linear_int16->takes(packed.size(1) * 2, group_size) && suit_int16<T>(x))
      return multiply<int16_t, T>(*path.linear_int16, x, packed, scales, bias, group_size, y);
  multiply<float, T>(*path.linear, x, packed, scales, bias, group_size, y);
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
  const Tensor activations = rows.stride(1) == 1 ? rows : rows.contiguous();
  const Tensor bytes = packed.contiguous(), scale = scales.contiguous();
  const Tensor added = is_given(bias) ? *bias : Tensor();
  if (aten_multiplies(path, x, added, m)) {
    multiply_by_aten(*path.kernels, activations, bytes, scale, added, group_size, y);
    return result;
  }
  const Tensor added32 = added.defined() ? added.contiguous().to(at::kFloat) : Tensor();
  const float* bias_values = added.defined() ? added32.const_data_ptr<float>() : nullptr;
  with_storage_type(x.scalar_type(), [&](auto zero) {
    multiply_in_the_fastest_type<decltype(zero)>(path, activations, bytes, scale, bias_values, group_size, y);
  });
  return result;
}

// dx = dy W by tiles of W's columns, which ATen multiplies: each sum is accumulated in float32 and rounded once.
void multiply_by_tiles(const cpu::Kernels& kernels, const Tensor& dy, const Tensor& packed, const Tensor& scales,
                       int64_t group_size, const Tensor& dx) {
  const int64_t n = packed.size(0), columns = packed.size(1) * 2, d = dx.size(1);
  const int64_t bytes = n * int64_t{2} * static_cast<int64_t>(dy.element_size());  // of two columns
  const int64_t width = std::clamp<int64_t>(kTileBytes / bytes, 1, columns / 2) * 2;
  const Tensor scratch = at::empty({n * width}, dy.options());
  for (int64_t first = 0; first < d; first += width) {
    const int64_t count = std::min(width, columns - first);
    const Tensor tile = scratch.narrow(0, 0, n * count).view({n, count});
    decode_column_tile(kernels, packed, scales, group_size, first, tile);
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
  const Tensor bytes = packed.contiguous(), scale = scales.contiguous();
  if (dy.scalar_type() == at::kFloat || (dy.scalar_type() == at::kBFloat16 && path.linear_bfloat16 != nullptr)) {
    multiply_by_tiles(*path.kernels, rows, bytes, scale, group_size, dx);
    return result;
  }
  for_each_stretch_of_activations(m, d + n, kActivationBytes, [&](int64_t first, int64_t count) {
    const Tensor dy32 = rows.narrow(0, first, count).to(at::kFloat);
    const Tensor dx32 = at::empty({count, d}, dy32.options());
    multiply_by_tiles(*path.kernels, dy32, bytes, scale, group_size, dx32);
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
