// The linear layer's kernels against sums in double, and the planner of tiles.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <type_traits>
#include <utility>

#include "csrc/cpu/group_cursor.h"
#include "csrc/cpu/linear.h"
#include "csrc/cpu/tiles.h"
#include "csrc/nf4/codec.h"
#include "tests/native/support.h"

namespace test {
namespace {

using namespace squish;
using nf4::BFloat16;
using nf4::Float16;

struct Weight {
  int64_t rows, columns, group_size;
  std::vector<uint8_t> packed;
  std::vector<float> scales;

  Weight(Random& random, int64_t rows, int64_t columns, int64_t group_size)
      : rows(rows), columns(columns), group_size(group_size) {
    packed.resize(static_cast<size_t>(rows * columns / 2));
    scales.resize(static_cast<size_t>(rows * columns / group_size));
    for (uint8_t& byte : packed) byte = static_cast<uint8_t>(random.bits());
    for (float& scale : scales) scale = random.between_minus_one_and_one();
  }
  float scale(int64_t row, int64_t column) const { return scales[(row * columns + column) / group_size]; }
  float at(int64_t row, int64_t column) const {
    const int64_t i = row * columns + column;
    const uint8_t byte = packed[i / 2];
    const uint32_t index = i % 2 == 0 ? nf4::even_index(byte) : nf4::odd_index(byte);
    return nf4::decode<float>(index, scales[i / group_size], nf4::kCodebook.level);
  }
};

template <typename T>
std::vector<T> random_values(Random& random, int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = nf4::from_float<T>(random.between_minus_one_and_one());
  return values;
}

// x: m rows of d values, `stride` apart. Rows [first, last) of the weight are computed; the others stay untouched.
template <typename Element, typename T>
std::vector<T> multiply(const cpu::LinearKernels<Element>& kernels, const Weight& w, const std::vector<T>& x, int64_t m,
                        int64_t d, int64_t stride, const std::vector<float>& bias, int64_t first, int64_t last,
                        Place place) {
  Buffer<uint8_t> packed(w.packed, place);
  Buffer<float> scales(w.scales, place), bias_buffer(bias, place);
  Buffer<T> from(x, place), y(std::vector<T>(static_cast<size_t>(m * w.rows), nf4::from_float<T>(12345.0f)), place);
  Buffer<Element> activations(m * cpu::packed_elements(kernels, w.columns), place);
  const int64_t blocks = cpu::blocks_of(m, kernels.block).count;
  for (int64_t block = 0; block < blocks; ++block)  // one by one, as threads share them
    cpu::pack_activations(kernels, from.data(), m, d, stride, w.columns, block, block + 1, activations.data());
  const cpu::LinearTask<Element, T> task{.kernels = kernels,
                                         .packed = packed.data(),
                                         .scales = scales.data(),
                                         .columns = w.columns,
                                         .group_size = w.group_size,
                                         .x = activations.data(),
                                         .m = m,
                                         .bias = bias.empty() ? nullptr : bias_buffer.data(),
                                         .y = y.data(),
                                         .y_stride = w.rows};
  Buffer<char> scratch(cpu::linear_scratch_bytes<Element>(m), place);
  cpu::linear_rows(task, first, last, scratch.data());
  return {y.data(), y.data() + m * w.rows};
}

// Half a unit of a level and half a unit of an activation, of magnitudes up to 1 (csrc/cpu/avx2_linear_int16.cpp).
constexpr double kInt16Error = 0.5 / 16384 + 0.5 / 8192 + 1e-8;

template <typename Element>
double rounded(float weight) {
  if constexpr (std::is_same_v<Element, int16_t>)
    return static_cast<double>(weight);
  else
    return static_cast<double>(nf4::to_float(nf4::convert<Element>(weight)));
}

template <typename T>
bool same(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

template <typename Element, typename T>
void check_case(const char* path, const cpu::LinearKernels<Element>& kernels, Random& random, int64_t rows,
                int64_t columns, int64_t group_size, int64_t m, int64_t d, bool with_bias) {
  const Weight w(random, rows, columns, group_size);
  const int64_t stride = d + 3;
  const std::vector<T> x = random_values<T>(random, (m - 1) * stride + d);
  const std::vector<float> bias = random_values<float>(random, with_bias ? rows : 0);
  const std::vector<T> y = multiply(kernels, w, x, m, d, stride, bias, 0, rows, Place::kHeap);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t row = 0; row < rows; ++row) {
      double sum = with_bias ? static_cast<double>(bias[row]) : 0.0, magnitude = std::fabs(sum), coarse = 0;
      for (int64_t column = 0; column < d; ++column) {
        const double weight = rounded<Element>(w.at(row, column));
        const double product = weight * static_cast<double>(nf4::to_float(x[i * stride + column]));
        sum += product;
        magnitude += std::fabs(product);
        if (std::is_same_v<Element, int16_t>)
          coarse += std::fabs(static_cast<double>(w.scale(row, column))) * kInt16Error;
      }
      // No order of summation in float32 can be further off than the first part; the second is the rounding of y.
      const double exponent = std::is_same_v<T, float> ? 0x1p-24 : std::is_same_v<T, BFloat16> ? 0x1p-8 : 0x1p-11;
      const double bound =
          static_cast<double>(columns + 2) * 0x1p-24 * magnitude + exponent * std::fabs(sum) + coarse + 0x1p-24;
      const auto found = static_cast<double>(nf4::to_float(y[i * rows + row]));
      CHECK(std::fabs(found - sum) <= bound, "%s, group_size %d, %d of %d columns, m %d: %a, not %a", path,
            int(group_size), int(d), int(columns), int(m), found, sum);
    }
  // The bits depend on neither the address nor the rows that are computed together.
  for (Place place : {Place::kBeforeGuard, Place::kAfterGuard}) {
    const std::vector<T> again = multiply(kernels, w, x, m, d, stride, bias, 0, rows, place);
    CHECK(std::memcmp(again.data(), y.data(), y.size() * sizeof(T)) == 0, "%s, m %d", path, int(m));
  }
  for (int64_t first : {int64_t{0}, rows / 3}) {
    const int64_t last = std::min(rows, first + 5);
    const std::vector<T> part = multiply(kernels, w, x, m, d, stride, bias, first, last, Place::kHeap);
    for (int64_t i = 0; i < m * rows; ++i) {
      const bool computed = i % rows >= first && i % rows < last;
      CHECK(same(part[i], computed ? y[i] : nf4::from_float<T>(12345.0f)), "%s: row %d of %d to %d, m %d", path,
            int(i % rows), int(first), int(last), int(m));
    }
  }
}

// Sizes around every threshold of the kernels: few and many activations, blocks, steps, chunks, padding, odd groups.
template <typename Element, typename T>
void check_path(const char* path, const cpu::LinearKernels<Element>& kernels, Random& random) {
  for (int64_t group_size : {1, 2, 3, 4, 5, 6, 8, 15, 16, 17, 25, 30, 32, 48, 50, 64, 66, 96, 100, 128}) {
    const int64_t block = std::lcm(int64_t{2}, group_size);
    for (int64_t blocks : {int64_t{1}, int64_t{3}, (256 + block - 1) / block})
      for (int64_t m : {1, 3, 7}) {
        check_case<Element, T>(path, kernels, random, 7, blocks * block, group_size, m, blocks * block, m == 3);
        check_case<Element, T>(path, kernels, random, 4, blocks * block, group_size, m, blocks * block - 1, false);
      }
  }
  for (int64_t m : {1, 2, 3, 4, 5, 6, 8, 12, 13, 47, 48, 50})
    for (int64_t rows : {1, 4, 70}) check_case<Element, T>(path, kernels, random, rows, 192, 64, m, 192, true);
  for (int64_t m : {1, 8, 49})  // more columns than a chunk, whole groups and not
    for (int64_t group_size : {2, 40, 64, 4800})
      check_case<Element, T>(path, kernels, random, 9, 4800, group_size, m, 4790, true);
  check_case<Element, T>(path, kernels, random, 5, 0, 64, 3, 0, true);
}

// An infinite scale is not multiplied with the zeros beside the row that fill up a step.
template <typename Element>
void check_infinite_scale(const char* path, const cpu::LinearKernels<Element>& kernels, Random& random) {
  for (int64_t group_size : {1, 5, 16, 32, 50, 64})
    for (int64_t m : {1, 6}) {
      const int64_t columns = 7 * std::lcm(int64_t{2}, group_size);
      Weight w(random, 4, columns, group_size);
      std::fill(w.packed.begin(), w.packed.end(), uint8_t{0xff});  // every level is 1
      std::fill(w.scales.begin(), w.scales.end(), INFINITY);
      const std::vector<Element> x(static_cast<size_t>(m * columns), nf4::from_float<Element>(1.0f));
      for (Element y : multiply(kernels, w, x, m, columns, columns, {}, 0, 4, Place::kHeap))
        CHECK(nf4::to_float(y) == INFINITY, "%s, group_size %d, m %d: %a", path, int(group_size), int(m),
              nf4::to_float(y));
    }
}

// Against integers of any size: float32 arithmetic would go wrong from some point on.
void check_group_cursor(Random& random) {
  for (int round = 0; round < 200000; ++round) {
    const int64_t group_size = 1 + random.bits() % (1u << (round % 31)), groups = 1 + random.bits() % 5;
    const int64_t columns = groups * group_size, column = static_cast<int64_t>(random.bits()) % columns;
    const int64_t count = 1 + random.bits() % 64;
    cpu::GroupCursor cursor = cpu::cursor_at(column, columns, group_size);
    const int64_t last = std::min(column + count, columns) - 1;
    CHECK(cpu::groups_touched(cursor, count) == last / group_size - column / group_size + 1,
          "%d columns from column %ld in groups of %ld", int(count), long(column), long(group_size));
    cpu::advance(cursor, count);
    CHECK(cursor.column == column + count && cursor.group == (column + count) / group_size &&
              cursor.left == group_size - (column + count) % group_size,
          "%d columns on from column %ld in groups of %ld", int(count), long(column), long(group_size));
  }
}

template <typename T>
void check_int16(const char* path, const cpu::LinearKernels<int16_t>& kernels, Random& random) {
  for (int64_t group_size : {32, 64, 128, 192})
    for (int64_t groups : {2, 6, 40})
      for (int64_t m : {1, 2, 3, 4}) {
        const int64_t columns = groups * group_size;
        CHECK(kernels.takes(m, columns, group_size), "%d columns, group_size %d", int(columns), int(group_size));
        check_case<int16_t, T>(path, kernels, random, 7, columns, group_size, m, columns, m == 3);
        check_case<int16_t, T>(path, kernels, random, 4, columns, group_size, m, columns - 31, false);
      }
  for (const auto& [columns, group_size] :
       {std::pair(96, 32), std::pair(128, 16), std::pair(192, 96), std::pair(100, 50)})
    CHECK(!kernels.takes(1, columns, group_size), "%d columns, group_size %d", columns, group_size);
}

}  // namespace

void check_linear() {
  Random random;
  check_group_cursor(random);
  for (const Path& path : available_paths()) {
    if (path.linear_int16 != nullptr) {
      check_int16<BFloat16>(path.name, *path.linear_int16, random);
      check_int16<Float16>(path.name, *path.linear_int16, random);
    }
    if (path.linear_bfloat16 != nullptr) {
      check_path<BFloat16, BFloat16>(path.name, *path.linear_bfloat16, random);
      check_infinite_scale(path.name, *path.linear_bfloat16, random);
      continue;  // everything else is the path's before it
    }
    check_path<float, float>(path.name, *path.linear, random);
    check_infinite_scale(path.name, *path.linear, random);
    check_path<float, BFloat16>(path.name, *path.linear, random);
    check_path<float, Float16>(path.name, *path.linear, random);
  }
}

// A tile keeps to the budget (or is a single row), and the tiles cover the rows exactly, so that a weight larger than
// the budget is never decoded whole.
void check_tiles() {
  Random random;
  for (int round = 0; round < 200000; ++round) {
    const int64_t n = random.bits() % (round % 2 ? 40 : 1u << 20), row_bytes = random.bits() % (1u << (round % 28));
    const int64_t budget = random.bits() % (1u << (round % 27));
    const cpu::Tiles tiles = cpu::cut_rows(n, row_bytes, budget);
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
