// Shares the rows of a weight out among the four runs that a kernel reads side by side, and finishes what it sums.
#include "csrc/cpu/linear.h"

#include <algorithm>

namespace squish::cpu {
namespace {

// Where the four runs of a stretch begin, and how many of them are rows of their own (the others repeat the last one).
struct Stretch {
  int64_t first[kRuns], rows;
  int count;
};

template <typename Element, typename T>
void store(const LinearTask<Element, T>& task, const Stretch& stretch, const float* sums) {
  for (int64_t i = 0; i < task.m; ++i)
    for (int run = 0; run < stretch.count; ++run) {
      const float* sum = sums + i * stretch.rows * kRuns + run;
      const float* bias = task.bias == nullptr ? nullptr : task.bias + stretch.first[run];
      T* y = task.y + i * task.y_stride + stretch.first[run];
      for (int64_t row = 0; row < stretch.rows; ++row)
        y[row] = nf4::from_float<T>(bias == nullptr ? sum[row * kRuns] : sum[row * kRuns] + bias[row]);
    }
}

template <typename Element, typename T>
void compute(const LinearTask<Element, T>& task, const Stretch& stretch, Element* scratch, float* sums) {
  RowRuns runs;
  for (int run = 0; run < kRuns; ++run) {
    runs.packed[run] = task.packed + stretch.first[run] * (task.columns / 2);
    runs.scales[run] = task.scales + stretch.first[run] * (task.columns / task.group_size);
  }
  runs.rows = stretch.rows;
  task.kernels.dot_products(runs, task.columns, task.group_size, task.x, task.m, scratch, sums);
  store(task, stretch, sums);
}

}  // namespace

template <typename Element, typename T>
void pack_activations(const LinearKernels<Element>& kernels, const T* x, int64_t m, int64_t d, int64_t stride,
                      int64_t columns, int64_t first, int64_t last, Element* out) {
  const int64_t elements = packed_elements(kernels, columns), padded = elements / kernels.step_elements * kernels.step;
  const int64_t block = blocks_of(m, kernels.block).rows;
  const auto pack = std::get<Activations<T, Element>>(kernels.activations).pack;
  for (int64_t i = first * block; i < std::min(m, last * block); i += block)
    pack(x + i * stride, std::min(block, m - i), d, stride, padded, out + i * elements);
}

template <typename Element, typename T>
void linear_rows(const LinearTask<Element, T>& task, int64_t first, int64_t last, void* scratch) {
  Element* elements = static_cast<Element*>(scratch);
  float* sums = reinterpret_cast<float*>(elements + linear_scratch<Element>(task.m, kRowsOfRun));
  const int64_t run_length = (last - first) / kRuns;
  for (int64_t row = 0; row < run_length; row += kRowsOfRun) {
    Stretch stretch{{}, std::min(kRowsOfRun, run_length - row), kRuns};
    for (int run = 0; run < kRuns; ++run) stretch.first[run] = first + run * run_length + row;
    compute(task, stretch, elements, sums);
  }
  const int64_t rest = first + kRuns * run_length;
  if (rest == last) return;
  Stretch stretch{{}, 1, static_cast<int>(last - rest)};
  for (int run = 0; run < kRuns; ++run) stretch.first[run] = std::min<int64_t>(rest + run, last - 1);
  compute(task, stretch, elements, sums);
}

#define SQUISH_LINEAR(Element, T)                                                                                      \
  template void pack_activations(const LinearKernels<Element>&, const T*, int64_t, int64_t, int64_t, int64_t, int64_t, \
                                 int64_t, Element*);                                                                   \
  template void linear_rows(const LinearTask<Element, T>&, int64_t, int64_t, void*);
SQUISH_LINEAR(float, float)
SQUISH_LINEAR(float, BFloat16)
SQUISH_LINEAR(float, Float16)
SQUISH_LINEAR(BFloat16, BFloat16)
SQUISH_LINEAR(int16_t, BFloat16)
SQUISH_LINEAR(int16_t, Float16)
#undef SQUISH_LINEAR

}  // namespace squish::cpu
