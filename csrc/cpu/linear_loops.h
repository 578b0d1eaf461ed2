// The linear layer's product, as all CPU paths share it. A path brings a type `V` in an anonymous namespace:
// - Element: what is multiplied, float or BFloat16
// - Operand, Sum, kLanes: a register of kLanes Elements, and one of float32 sums
// - kBlock, kFew: activations that fit the registers beside four rows, and beside four rows that are being decoded
// - OneGroup(scale): what a step decodes to if it lies in one group
// - TwoGroups(scale, scale): the same, if each half of its lanes does
// - Lanes(cursor): for steps where group_size is no multiple of kLanes, or that are a row's last and incomplete. It
// holds
//   the groups of each lane's even and odd column, counted from the cursor's group; one Lanes serves all rows
// - LaneScales(scales, lanes): the scales of these columns in one row; `scales` points at that of the cursor's group
// - decode(packed, one of these, even, odd): kLanes bytes to their even and their odd columns. With LaneScales it reads
//   no bytes beyond the row, and columns there are zero
// - split(x, even, odd), if the compiler is to be helped: a step's activations to its two half steps
// - zero(), load(Element*), store(Element*, Operand), multiply_add(Operand, Operand, Sum)
// - totals(Sum a, b, c, d): the total of each
//
// Both factors are laid out alike, in half steps: a step is 2 * kLanes columns, its first half the even ones and its
// second the odd ones, as a byte holds them. Each half step holds kLanes elements of every row, one row after another.
//
// Included inside a path's target region, like codec_loops.h: everything here is a template over V or has internal
// linkage, and target_region.h has what comes from outside.
#pragma once

#include "csrc/cpu/group_cursor.h"
#include "csrc/cpu/target_region.h"

namespace squish::cpu {

// Half steps of m rows: out[(half * m + row) * kLanes + lane]. Columns from d on are zero.
template <class V, typename T>
void pack_rows(const T* x, int64_t m, int64_t d, int64_t stride, int64_t columns, typename V::Element* out) {
  constexpr int64_t kStep = 2 * V::kLanes;
  for (int64_t start = 0; start < columns; start += kStep, out += m * kStep)
    for (int64_t row = 0; row < m; ++row) {
      const T* from = x + row * stride + start;
      typename V::Element* even = out + row * V::kLanes;
      typename V::Element* odd = even + m * V::kLanes;
      if (start + kStep <= d) {
        if constexpr (requires { V::split(from, even, odd); }) {
          V::split(from, even, odd);
        } else {
          for (int64_t lane = 0; lane < V::kLanes; ++lane) {
            even[lane] = nf4::convert<typename V::Element>(from[2 * lane]);
            odd[lane] = nf4::convert<typename V::Element>(from[2 * lane + 1]);
          }
        }
      } else {
        const int64_t left = d - start;
        for (int64_t lane = 0; lane < V::kLanes; ++lane) {
          even[lane] = 2 * lane < left ? nf4::convert<typename V::Element>(from[2 * lane]) : typename V::Element{};
          odd[lane] =
              2 * lane + 1 < left ? nf4::convert<typename V::Element>(from[2 * lane + 1]) : typename V::Element{};
        }
      }
    }
}

// A float32 for each run, in a register.
typedef float Four __attribute__((vector_size(kRuns * sizeof(float))));

static inline Four load_four(const float* from) {
  Four loaded;
  std::memcpy(&loaded, from, sizeof loaded);
  return loaded;
}
static inline void store_four(float* to, Four x) { std::memcpy(to, &x, sizeof x); }

// One row of each run.
struct RowOfEachRun {
  const uint8_t* packed[kRuns];
  const float* scales[kRuns];
};

static inline RowOfEachRun row_of_each_run(const RowRuns& runs, int64_t row, int64_t columns, int64_t group_size) {
  RowOfEachRun rows;
  for (int run = 0; run < kRuns; ++run) {
    rows.packed[run] = runs.packed[run] + row * (columns / 2);
    rows.scales[run] = runs.scales[run] + row * (columns / group_size);
  }
  return rows;
}

// The rows of a run are neighbours in memory, so that prefetching a fixed distance ahead goes on into the next row.
inline constexpr int64_t kPrefetchBytes = 1024;

static inline int64_t byte_of(int64_t column) { return static_cast<int64_t>(static_cast<uint64_t>(column) / 2); }

// Calls use(run, levels, column) for every step of columns [first, last), levels being OneGroup, TwoGroups or
// LaneScales of V: runs innermost, so that four streams of memory are read side by side. Inlined, so that the sums of
// `use` are registers.
template <class V, typename Use>
__attribute__((always_inline)) inline void for_each_step(const RowOfEachRun& rows, int64_t first, int64_t last,
                                                         int64_t columns, int64_t group_size, const Use& use) {
  constexpr int64_t kStep = 2 * V::kLanes;
  const auto use_levels = [&](int run, const auto& levels, int64_t column) __attribute__((always_inline)) {
    __builtin_prefetch(rows.packed[run] + byte_of(column) + kPrefetchBytes);
    use(run, levels, column);
  };
  if (group_size % kStep == 0) {
    int64_t group = first / group_size, stop = (group + 1) * group_size;
    for (int64_t column = first; column < last; stop += group_size, ++group) {
      typename V::OneGroup levels[kRuns];
      for (int run = 0; run < kRuns; ++run) levels[run] = typename V::OneGroup(rows.scales[run][group]);
      for (const int64_t end = std::min(stop, last); column < end; column += kStep)
        for (int run = 0; run < kRuns; ++run) use_levels(run, levels[run], column);
    }
    return;
  }
  // Of small groups there are so many that the scales are to be fetched ahead, too.
  const auto scales_from = [&](int run, int64_t group) {
    const float* scales = rows.scales[run] + group;
    __builtin_prefetch(scales + kPrefetchBytes / sizeof(float));
    return scales;
  };
  GroupCursor cursor = cursor_at(first, columns, group_size);
  if (group_size % V::kLanes == 0) {
    const auto pass_half_a_step = [&] {
      const int64_t group = cursor.group;
      advance(cursor, V::kLanes);
      return group;
    };
    while (cursor.column < last && cursor.column + kStep <= columns) {
      const int64_t column = cursor.column, one = pass_half_a_step(), other = pass_half_a_step();
      for (int run = 0; run < kRuns; ++run)
        use_levels(run, typename V::TwoGroups(*scales_from(run, one), rows.scales[run][other]), column);
    }
  }
  const bool lanes_repeat =
      kStep % group_size == 0;  // every step begins with a group: Lanes hold for the next one, too
  while (cursor.column < last) {
    const typename V::Lanes lanes(cursor);
    bool again;
    do {
#pragma GCC unroll 4
      for (int run = 0; run < kRuns; ++run)  // the sums of the runs have to stay in registers
        use_levels(run, typename V::LaneScales(scales_from(run, cursor.group), lanes), cursor.column);
      again = lanes_repeat && cursor.column + 2 * kStep <= std::min(last, columns);  // the next step is whole
      advance(cursor, kStep);
    } while (again);
  }
}

// Few activations: every decoded register is multiplied with all of them at once, and never stored.
template <class V, int M>
void decode_and_multiply(const RowOfEachRun& rows, int64_t columns, int64_t group_size, const typename V::Element* x,
                         int64_t stride, float* sums) {
  typename V::Sum sum[M][kRuns];
  for (int i = 0; i < M; ++i)
    for (int run = 0; run < kRuns; ++run) sum[i][run] = V::zero();
  const auto use = [&](int run, const auto& levels, int64_t column) __attribute__((always_inline)) {
    typename V::Operand even, odd;
    V::decode(rows.packed[run] + byte_of(column), levels, even, odd);
    const typename V::Element* xi = x + column * M;
    for (int i = 0; i < M; ++i, xi += V::kLanes) {
      sum[i][run] = V::multiply_add(even, V::load(xi), sum[i][run]);
      sum[i][run] = V::multiply_add(odd, V::load(xi + M * V::kLanes), sum[i][run]);
    }
  };
  for_each_step<V>(rows, 0, columns, columns, group_size, use);
  for (int i = 0; i < M; ++i) store_four(sums + i * stride, V::totals(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
}

// Decodes columns [first, last) of four rows into half steps.
template <class V>
void decode_rows(const RowOfEachRun& rows, int64_t first, int64_t last, int64_t columns, int64_t group_size,
                 typename V::Element* out) {
  const auto use = [&](int run, const auto& levels, int64_t column) __attribute__((always_inline)) {
    typename V::Operand even, odd;
    V::decode(rows.packed[run] + byte_of(column), levels, even, odd);
    typename V::Element* to = out + (column - first) * kRuns + run * V::kLanes;
    V::store(to, even);
    V::store(to + kRuns * V::kLanes, odd);
  };
  for_each_step<V>(rows, first, last, columns, group_size, use);
}

// Four decoded rows times M activations, `half_steps` of them. sums[i * stride + run]: set, or added to.
template <class V, int M>
void multiply_decoded(const typename V::Element* w, const typename V::Element* x, int64_t half_steps, bool add,
                      int64_t stride, float* sums) {
  typename V::Sum sum[M][kRuns];
  for (int i = 0; i < M; ++i)
    for (int run = 0; run < kRuns; ++run) sum[i][run] = V::zero();
  for (int64_t half = 0; half < half_steps; ++half, w += kRuns * V::kLanes, x += M * V::kLanes) {
    typename V::Operand row[kRuns];
    for (int run = 0; run < kRuns; ++run) row[run] = V::load(w + run * V::kLanes);
    for (int i = 0; i < M; ++i) {
      const typename V::Operand xi = V::load(x + i * V::kLanes);
      for (int run = 0; run < kRuns; ++run) sum[i][run] = V::multiply_add(row[run], xi, sum[i][run]);
    }
  }
  for (int i = 0; i < M; ++i) {
    Four total = V::totals(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
    if (add) total += load_four(sums + i * stride);
    store_four(sums + i * stride, total);
  }
}

// Calls f(std::integral_constant<int, m>) for 1 <= m <= Most: the number of activations becomes a constant, so that
// their sums live in registers.
template <int Most, typename F>
void with_constant(int64_t m, const F& f) {
  if constexpr (Most > 1)
    if (m < Most) return with_constant<Most - 1>(m, f);
  f(std::integral_constant<int, Most>{});
}

template <class V>
void dot_products(const RowRuns& runs, int64_t columns, int64_t group_size, const typename V::Element* x, int64_t m,
                  typename V::Element* scratch, float* sums) {
  using Element = typename V::Element;
  constexpr int64_t kStep = 2 * V::kLanes;
  const int64_t stride = runs.rows * kRuns;  // from one activation's sums to the next
  if (m <= V::kFew) {
    with_constant<V::kFew>(m, [&](auto constant) {
      for (int64_t row = 0; row < runs.rows; ++row)
        decode_and_multiply<V, constant>(row_of_each_run(runs, row, columns, group_size), columns, group_size, x,
                                         stride, sums + row * kRuns);
    });
    return;
  }
  const int64_t padded = (columns + kStep - 1) / kStep * kStep;
  const int64_t block = blocks_of(m, V::kBlock).rows;
  const int64_t at_once = rows_decoded_at_once(m, runs.rows);
  for (int64_t first_row = 0; first_row < runs.rows; first_row += at_once) {
    const int64_t last_row = std::min(runs.rows, first_row + at_once);
    for (int64_t first = 0; first < padded || first == 0; first += kLinearChunk<Element>) {
      const int64_t last = std::min(padded, first + kLinearChunk<Element>);
      for (int64_t row = first_row; row < last_row; ++row)
        decode_rows<V>(row_of_each_run(runs, row, columns, group_size), first, last, columns, group_size,
                       scratch + (row - first_row) * kRuns * kLinearChunk<Element>);
      for (int64_t i = 0; i < m; i += block)
        with_constant<V::kBlock>(std::min(block, m - i), [&](auto constant) {
          for (int64_t row = first_row; row < last_row; ++row)
            multiply_decoded<V, constant>(scratch + (row - first_row) * kRuns * kLinearChunk<Element>,
                                          x + i * padded + first * constant, (last - first) / V::kLanes, first != 0,
                                          stride, sums + i * stride + row * kRuns);
        });
    }
  }
}

template <class V, typename... T>
constexpr LinearKernels<typename V::Element> linear_kernels_of() {
  using Element = typename V::Element;
  return {.step = 2 * V::kLanes,
          .step_elements = 2 * V::kLanes,
          .block = V::kBlock,
          .activations = {Activations<T, Element>{.pack = &pack_rows<V, T>}...},
          .dot_products = &dot_products<V>};
}

}  // namespace squish::cpu
