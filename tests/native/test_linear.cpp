// The fused linear kernels against sums in double, what stands around them, and the planner of tiles.
#include <algorithm>
#include <cmath>

#include "csrc/cpu/activations.h"
#include "csrc/nf4/codec.h"
#include "csrc/nf4/tiles.h"
#include "tests/native/support.h"

namespace test {
namespace {

using namespace squish;
using nf4::BFloat16;
using nf4::Float16;

struct Problem {
  int64_t rows, columns, group_size;
  std::vector<uint8_t> packed;
  std::vector<float> scales;

  Problem(Random& random, int64_t rows, int64_t columns, int64_t group_size)
      : rows(rows), columns(columns), group_size(group_size) {
    packed.resize(static_cast<size_t>(rows * columns / 2));
    scales.resize(static_cast<size_t>(rows * columns / group_size));
    for (uint8_t& byte : packed) byte = static_cast<uint8_t>(random.bits());
    for (float& scale : scales) scale = random.between_minus_one_and_one();
  }
  Problem row(int64_t r) const {
    Problem one = *this;
    const int64_t bytes = columns / 2, groups = columns / group_size;
    one.rows = 1;
    one.packed.assign(packed.begin() + r * bytes, packed.begin() + (r + 1) * bytes);
    one.scales.assign(scales.begin() + r * groups, scales.begin() + (r + 1) * groups);
    return one;
  }
  float weight(int64_t row, int64_t column) const {
    const int64_t i = row * columns + column;
    const uint8_t byte = packed[i / 2];
    const uint32_t index = i % 2 == 0 ? nf4::even_index(byte) : nf4::odd_index(byte);
    return nf4::decode<float>(index, scales[i / group_size], nf4::kCodebook.level);
  }
};

std::vector<float> split(const Problem& p, const std::vector<float>& x, int64_t m) {
  std::vector<float> out(x.size());
  cpu::split_columns(x.data(), m, p.columns, p.columns, p.columns, p.group_size, out.data());
  return out;
}

std::vector<float> multiply(const Path& path, const Problem& p, const std::vector<float>& x, int64_t m, Place place) {
  Buffer<uint8_t> packed(p.packed, place);
  Buffer<float> scales(p.scales, place), activations(split(p, x, m), place), y(p.rows * m, place);
  for (int64_t i = 0; i < p.rows * m; ++i) y.data()[i] = NAN;  // what the kernel leaves unset does not pass
  path.kernels->linear_rows(packed.data(), scales.data(), p.rows, p.columns, p.group_size, activations.data(), m,
                            y.data());
  return {y.data(), y.data() + p.rows * m};
}

void check_close(const Path& path, const Problem& p, const std::vector<float>& x, int64_t m,
                 const std::vector<float>& y) {
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t i = 0; i < m; ++i) {
      double sum = 0, magnitude = 0;
      for (int64_t c = 0; c < p.columns; ++c) {
        const double product = static_cast<double>(p.weight(r, c)) * static_cast<double>(x[i * p.columns + c]);
        sum += product;
        magnitude += std::fabs(product);
      }
      // No order of summation in float32 can be further off than this.
      const double bound = static_cast<double>(p.columns + 1) * 0x1p-24 * magnitude;
      CHECK(std::fabs(y[r * m + i] - sum) <= bound, "%s, group_size %d, %d columns, m %d: %a, not %a", path.name,
            int(p.group_size), int(p.columns), int(m), y[r * m + i], sum);
    }
}

void check_path(const Path& path, Random& random, int64_t columns, int64_t group_size) {
  const Problem p(random, 3, columns, group_size);
  for (int64_t m = 1; m <= cpu::kLinearBatch; ++m) {
    std::vector<float> x(static_cast<size_t>(m * columns));
    for (float& value : x) value = random.between_minus_one_and_one();
    const std::vector<float> all = multiply(path, p, x, m, Place::kHeap);
    check_close(path, p, x, m, all);
    // The order of summation depends on the path, m, columns and group_size: not on the address, nor on other rows.
    CHECK(multiply(path, p, x, m, Place::kBeforeGuard) == all, "%s, m %d", path.name, int(m));
    CHECK(multiply(path, p, x, m, Place::kAfterGuard) == all, "%s, m %d", path.name, int(m));
    for (int64_t r = 0; r < p.rows; ++r) {
      const std::vector<float> y = multiply(path, p.row(r), x, m, Place::kHeap);
      CHECK(std::equal(y.begin(), y.end(), all.begin() + r * m), "%s: row %d alone, m %d", path.name, int(r), int(m));
    }
  }
}

template <typename T>
void check_split(Random& random, int64_t m, int64_t d, int64_t columns, int64_t group_size, int64_t stride) {
  std::vector<T> x(static_cast<size_t>((m - 1) * stride + d));
  for (T& value : x) value = nf4::from_float<T>(random.between_minus_one_and_one());
  const int64_t block = cpu::activation_block(m, columns, group_size);
  for (Place place : kPlaces) {
    Buffer<T> from(x, place);
    Buffer<float> out(m * columns, place);
    cpu::split_columns(from.data(), m, d, stride, columns, group_size, out.data());
    for (int64_t i = 0; i < m; ++i)
      for (int64_t c = 0; c < columns; ++c) {
        const int64_t start = c / block * block, in_block = std::min(block, columns - start), at = c - start;
        const float found = out[m * start + i * in_block + (at % 2 == 0 ? at / 2 : in_block / 2 + at / 2)];
        const float expected = c < d ? nf4::to_float(x[i * stride + c]) : 0.0f;
        CHECK(found == expected, "d %d of %d, column %d: %a, not %a", int(d), int(columns), int(c), found, expected);
      }
  }
}

template <typename T>
void check_add_bias(Random& random, int64_t rows, int64_t m, int64_t stride, bool with_bias) {
  std::vector<float> y(static_cast<size_t>(rows * m)), bias(static_cast<size_t>(rows));
  for (float& value : y) value = random.between_minus_one_and_one();
  for (float& value : bias) value = random.between_minus_one_and_one();
  const T untouched = nf4::from_float<T>(12345.0f);
  for (Place place : kPlaces) {
    Buffer<float> from(y, place), added(bias, place);
    Buffer<T> out(std::vector<T>(static_cast<size_t>((m - 1) * stride + rows), untouched), place);
    cpu::add_bias(from.data(), with_bias ? added.data() : nullptr, rows, m, stride, out.data());
    for (int64_t at = 0; at < (m - 1) * stride + rows; ++at) {
      const int64_t i = at / stride, r = at % stride;
      const float sum = r < rows ? y[r * m + i] + (with_bias ? bias[r] : 0.0f) : 0.0f;
      const T expected = r < rows ? nf4::from_float<T>(sum) : untouched;
      CHECK(nf4::to_float(out[at]) == nf4::to_float(expected), "row %d of activation %d", int(r), int(i));
    }
  }
}

}  // namespace

void check_linear() {
  Random random;
  for (const Path& path : available_paths()) {
    for (int64_t group_size : {2, 4, 6, 16, 30, 32, 34, 64, 96, 100})
      for (int64_t groups : {0, 1, 3}) check_path(path, random, groups * group_size, group_size);
    // More columns than one block of activations takes, the last block shorter.
    check_path(path, random, 2 * 1031, 2);
    check_path(path, random, 32 * 41, 32);
    check_path(path, random, 9000 * 2, 9000);
  }
  for (int64_t columns : {0, 2, 32, 66, 2062, 16392})
    for (int64_t d = columns; d >= 0 && d > columns - 4; --d)
      for (int64_t m : {1, 3, 8}) {
        check_split<float>(random, m, d, columns, 2, d + 5);
        check_split<BFloat16>(random, m, d, columns, 2, d);
        check_split<Float16>(random, m, d, columns, columns == 0 ? 4 : columns, d + 1);
      }
  check_split<float>(random, 8, 2100, 4000, 800, 4000);  // padding over more than one block
  for (bool with_bias : {false, true})
    for (int64_t rows : {1, 7, 32}) {
      check_add_bias<float>(random, rows, 3, rows + 2, with_bias);
      check_add_bias<BFloat16>(random, rows, 8, rows, with_bias);
      check_add_bias<Float16>(random, rows, 1, rows + 1, with_bias);
    }
}

// A tile keeps to the budget (or is a single row), and the tiles cover the rows exactly, so that a weight larger than
// the budget is never decoded whole.
void check_tiles() {
  Random random;
  for (int round = 0; round < 200000; ++round) {
    const int64_t n = random.bits() % (round % 2 ? 40 : 1u << 20), row_bytes = random.bits() % (1u << (round % 28));
    const int64_t budget = random.bits() % (1u << (round % 27));
    const nf4::Tiles tiles = nf4::cut_rows(n, row_bytes, budget);
    if (n == 0) {
      CHECK(tiles.rows == 0 && tiles.count == 0, "tiles of nothing");
      continue;
    }
    CHECK(tiles.rows >= 1 && tiles.count >= 1, "n %ld, row %ld, budget %ld", long(n), long(row_bytes), long(budget));
    CHECK(tiles.rows == 1 || tiles.rows * row_bytes <= budget, "n %ld, row %ld, budget %ld: %ld rows", long(n),
          long(row_bytes), long(budget), long(tiles.rows));
    CHECK((tiles.count - 1) * tiles.rows < n && n <= tiles.count * tiles.rows, "n %ld: %ld tiles of %ld", long(n),
          long(tiles.count), long(tiles.rows));
    CHECK(n == 1 || n * row_bytes <= budget || tiles.count > 1, "a weight larger than the budget is one tile");
    CHECK(n * row_bytes > budget || row_bytes == 0 || tiles.count == 1, "a weight within the budget is cut");
  }
}

}  // namespace test
