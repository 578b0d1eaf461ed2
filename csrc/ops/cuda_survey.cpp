// _survey_nf4 on CUDA: a plain composition of ATen's operators and dequantize_nf4, for some rows at a time. The values
// are those of the CPU; the float64 sums are added in ATen's order, so their last digits are not.
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "csrc/cpu/tiles.h"
#include "csrc/ops/calls.h"
#include "csrc/ops/checks.h"

namespace squish::ops {
namespace {

constexpr int64_t kScratchBytes = int64_t{64} << 20;
constexpr int64_t kBytesOfColumn = 48;  // of all that survey_rows holds at once

// (n, 4) of w, (n, d) with d >= 1, and of what is decoded in its place.
Tensor survey_rows(const Tensor& w, const Tensor& decoded) {
  const Tensor rounded = w.to(at::kFloat), exact = rounded.to(at::kDouble), magnitude = exact.abs();
  const Tensor lost = at::sub(rounded, decoded).to(at::kDouble);  // a difference is rounded to float32 once
  return at::stack({magnitude.amax(1), magnitude.sum(1), exact.square().sum(1), lost.square().sum(1)}, 1);
}

Tensor survey_nf4(const Tensor& w, const Tensor& packed, const Tensor& scales, int64_t group_size) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_survey(w, packed, scales, group_size);
  const c10::DeviceGuard device(w.device());
  const int64_t n = w.size(0), d = w.size(1);
  const auto options = w.options().dtype(at::kDouble);
  if (d == 0) return at::zeros({n, 4}, options);
  Tensor result = at::empty({n, 4}, options);
  const cpu::Tiles tiles = cpu::cut_rows(n, packed.size(1) * 2 * kBytesOfColumn, kScratchBytes);
  for (int64_t row = 0; row < n; row += tiles.rows) {
    const auto of_tile = [&](const Tensor& matrix) { return matrix.narrow(0, row, std::min(tiles.rows, n - row)); };
    const Tensor decoded = call_dequantize(of_tile(packed), of_tile(scales), group_size, at::kFloat);
    of_tile(result).copy_(survey_rows(of_tile(w), decoded.narrow(1, 0, d)));  // without the padding
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(squish, CUDA, m) { m.impl("_survey_nf4", &survey_nf4); }

}  // namespace squish::ops
