// The walk over a packed weight too large to decode at once, the same on CPU and CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "csrc/cpu/tiles.h"

namespace squish::ops {

using at::Tensor;

// Decodes the weight tile by tile into one scratch of at most `budget_bytes` (but at least one row).
//   decode(first_row, tile): fills `tile`, (rows, columns) and contiguous.
//   use(first_row, tile): gets the same tile, its first d columns: without the padding.
template <typename Decode, typename Use>
void for_each_tile(const Tensor& packed, int64_t d, at::ScalarType dtype, int64_t budget_bytes, const Decode& decode,
                   const Use& use) {
  const int64_t n = packed.size(0), columns = packed.size(1) * 2;
  const cpu::Tiles tiles = cpu::cut_rows(n, columns * static_cast<int64_t>(at::elementSize(dtype)), budget_bytes);
  const Tensor scratch = at::empty({tiles.rows, columns}, packed.options().dtype(dtype));
  for (int64_t row = 0; row < n; row += tiles.rows) {
    const Tensor tile = scratch.narrow(0, 0, std::min(tiles.rows, n - row));
    decode(row, tile);
    use(row, tile.narrow(1, 0, d));
  }
}

// Calls use(first, count) for stretches of m activations such that `floats` float32 values for each fit the budget.
template <typename Use>
void for_each_stretch_of_activations(int64_t m, int64_t floats, int64_t budget_bytes, const Use& use) {
  const cpu::Tiles stretches = cpu::cut_rows(m, floats * 4, budget_bytes);
  for (int64_t first = 0; first < m; first += stretches.rows) use(first, std::min(stretches.rows, m - first));
}

}  // namespace squish::ops
