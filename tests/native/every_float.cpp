// Encodes every float of [-1, 1] with every path this CPU has, and compares with the definition.
// Arguments: the 16 levels. Prints one line per path: its name, the floats compared, those that differ.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <string>
#include <thread>
#include <vector>

#include "csrc/cpu/dispatch.h"
#include "tests/native/definition.h"

namespace {

constexpr uint32_t kMagnitudeOfOne = 0x3f800000;
constexpr uint32_t kMagnitudes = kMagnitudeOfOne + 1;  // zero, every float between, one
constexpr uint32_t kAtOnce = 16 * definition::kBlock;
constexpr uint32_t kColumns = kAtOnce + 2;  // two more columns hold 1.0, so that the scale of the group is 1.0
constexpr uint32_t kShown = 5;              // differences printed per thread

struct Path {
  const squish::cpu::Path& path;
  explicit Path(const squish::cpu::Path& its_path) : path(its_path) {}
  std::atomic<uint64_t> compared{0}, different{0};
};

void check_stretch(std::deque<Path>& paths, const float* level, uint32_t first, uint32_t count, uint32_t sign,
                   std::vector<float>& w, std::vector<int32_t>& expected, std::vector<uint8_t>& packed) {
  for (uint32_t i = 0; i < kAtOnce; ++i) w[i] = std::bit_cast<float>(sign | (i < count ? first + i : kMagnitudeOfOne));
  w[kAtOnce] = w[kAtOnce + 1] = 1.0f;
  for (uint32_t i = 0; i < kAtOnce; i += definition::kBlock)
    definition::nearest_levels(w.data() + i, level, expected.data() + i);
  for (Path& path : paths) {
    float scale = 0;
    path.path.codec<float>().encode(w.data(), kColumns, kColumns, packed.data(), &scale);
    uint64_t different = scale == 1.0f ? 0 : count;
    for (uint32_t i = 0; i < count; ++i) {
      const int32_t found = i % 2 == 0 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
      if (found == expected[i]) continue;
      if (++different <= kShown)
        std::fprintf(stderr, "%s: %a has index %d, not %d\n", path.path.name, w[i], found, expected[i]);
    }
    path.compared += count;
    path.different += different;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 1 + definition::kLevels) return 2;
  float level[definition::kLevels];
  for (int k = 0; k < definition::kLevels; ++k) level[k] = std::strtof(argv[1 + k], nullptr);

  std::deque<Path> paths;
  for (const squish::cpu::Path& path : squish::cpu::paths()) {
    const auto encodes_alike = [&](const Path& other) { return other.path.codecs == path.codecs; };
    if (squish::cpu::is_available(path) && std::none_of(paths.begin(), paths.end(), encodes_alike))
      paths.emplace_back(path);
  }

  std::atomic<uint64_t> next{0};
  const auto work = [&] {
    std::vector<float> w(kColumns);
    std::vector<int32_t> expected(kAtOnce);
    std::vector<uint8_t> packed(kColumns / 2);
    for (uint64_t first; (first = next.fetch_add(kAtOnce)) < kMagnitudes;) {
      const uint64_t left = kMagnitudes - first;
      const auto count = static_cast<uint32_t>(left < kAtOnce ? left : kAtOnce);
      for (uint32_t sign : {0u, 0x80000000u})
        check_stretch(paths, level, static_cast<uint32_t>(first), count, sign, w, expected, packed);
    }
  };
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();

  bool all_equal = true;
  for (const Path& path : paths) {
    std::printf("%s %llu %llu\n", path.path.name, static_cast<unsigned long long>(path.compared),
                static_cast<unsigned long long>(path.different));
    all_equal = all_equal && path.different == 0;
  }
  return all_equal ? 0 : 1;
}
