// Runs one kernel of one CPU path inside run(), where callgrind counts: scalar|avx2 quantize|dequantize|linear|odd.
// 64 rows of 1024 float32 columns in groups of 32; linear takes one activation. odd: linear in groups of 16 * 3 + 2,
// which begin anywhere in a step; the last step of a row is shorter.
#include <cstdlib>
#include <string>
#include <vector>

#include "csrc/cpu/kernels.h"
#include "csrc/cpu/linear.h"

namespace {

using namespace squish;

constexpr int64_t kRows = 64, kColumns = 1024, kGroup = 32, kOddColumns = 1000, kOddGroup = 50;
alignas(64) uint8_t packed[kRows * kColumns / 2];
alignas(64) float scales[kRows * kColumns / kGroup], dense[kRows * kColumns], sums[kRows];
alignas(64) float x[kColumns], scratch[cpu::linear_scratch<float>(1, kRows / cpu::kRuns)];

void linear(const cpu::LinearKernels<float>& kernels, int64_t columns, int64_t group) {
  cpu::RowRuns runs;
  runs.rows = kRows / cpu::kRuns;
  for (int run = 0; run < cpu::kRuns; ++run) {
    runs.packed[run] = packed + run * runs.rows * columns / 2;
    runs.scales[run] = scales + run * runs.rows * columns / group;
  }
  kernels.dot_products(runs, columns, group, x, 1, scratch, sums);
}

}  // namespace

extern "C" __attribute__((noinline)) void run(const cpu::Codec<float>& codec, const cpu::LinearKernels<float>& kernels,
                                              const std::string& what) {
  if (what == "quantize") codec.encode(dense, kRows * kColumns, kGroup, packed, scales);
  if (what == "dequantize") codec.decode(packed, scales, 0, kRows * kColumns, kGroup, dense);
  if (what == "linear") linear(kernels, kColumns, kGroup);
  if (what == "odd") linear(kernels, kOddColumns, kOddGroup);
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  for (int64_t i = 0; i < kRows * kColumns; ++i) dense[i] = static_cast<float>(i * 7919 % 65536 - 32768);
  const bool avx2 = argv[1] == std::string("avx2");
  run(std::get<cpu::Codec<float>>(avx2 ? cpu::kAvx2Codecs : cpu::kScalarCodecs),
      avx2 ? cpu::kAvx2Linear : cpu::kScalarLinear, argv[2]);
}
