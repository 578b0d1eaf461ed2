// For the thread sanitizer: threads share one matrix by ranges of rows, beginning with the first choice of the path.
// With the argument "race" two of them write one byte, which the sanitizer has to report.
#include <cstring>
#include <thread>
#include <vector>

#include "csrc/c/squish_nf4.h"
#include "csrc/cpu/dispatch.h"

int main(int argc, char** argv) {
  constexpr int64_t n = 64, d = 96, group_size = 32, threads = 4;
  const bool race = argc > 1 && std::strcmp(argv[1], "race") == 0;
  std::vector<float> w(n * d), decoded(n * d), scales(n * d / group_size), x(d), y(n);
  std::vector<uint8_t> packed(n * d / 2);
  for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(i % 37) - 18.0f;
  const squish::cpu::LinearKernels<float>& linear = *squish::cpu::selection().path->linear;
  std::vector<float> activations(squish::cpu::packed_elements(linear, d));
  squish::cpu::pack_activations(linear, x.data(), 1, d, d, d, 0, 1, activations.data());
  std::vector<std::thread> pool;
  for (int64_t t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      const int64_t first = t * n / threads, last = (t + 1) * n / threads;
      squish_nf4_quantize(w.data(), SQUISH_NF4_FLOAT32, n, d, group_size, race ? 0 : first, last, packed.data(),
                          scales.data());
      squish_nf4_dequantize(packed.data(), scales.data(), n, d, group_size, first, last, SQUISH_NF4_FLOAT32,
                            decoded.data());
      const squish::cpu::LinearTask<float, float> task{.kernels = linear,
                                                       .packed = packed.data(),
                                                       .scales = scales.data(),
                                                       .columns = d,
                                                       .group_size = group_size,
                                                       .x = activations.data(),
                                                       .m = 1,
                                                       .bias = nullptr,
                                                       .y = y.data(),
                                                       .y_stride = n};
      std::vector<char> scratch(squish::cpu::linear_scratch_bytes<float>(1));
      squish::cpu::linear_rows(task, first, last, scratch.data());
    });
  }
  for (std::thread& thread : pool) thread.join();
  return 0;
}
