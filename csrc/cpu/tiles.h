// How a layer too large to decode at once is cut into tiles. Plain arithmetic, shared by the CPU and CUDA operators.
#pragma once

#include <algorithm>
#include <cstdint>

namespace squish::cpu {

struct Tiles {
  int64_t rows;   // rows of a tile; the last one may be shorter
  int64_t count;  // tiles
};

// Cuts n rows of `row_bytes` decoded bytes each so that a tile takes at most `budget_bytes`, but at least one row.
// All tiles but the last are equal; with as few tiles, they could not be smaller.
constexpr Tiles cut_rows(int64_t n, int64_t row_bytes, int64_t budget_bytes) {
  if (n == 0) return {0, 0};
  const int64_t most = std::clamp<int64_t>(budget_bytes / std::max<int64_t>(row_bytes, 1), 1, n);
  const int64_t count = (n + most - 1) / most;
  return {(n + count - 1) / count, count};
}

static_assert(cut_rows(1000, 4096, 1 << 20).rows == 250 && cut_rows(1000, 4096, 1 << 20).count == 4);
static_assert(cut_rows(3, 1 << 30, 1 << 20).rows == 1 && cut_rows(3, 1 << 30, 1 << 20).count == 3);

}  // namespace squish::cpu
