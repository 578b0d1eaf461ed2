// Chooses the CPU path once, by what the CPU has and what SQUISH_NF4_ISA allows.
#include "csrc/cpu/dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <array>
#include <cstdlib>
#include <fstream>
#include <string_view>

namespace squish::cpu {
namespace {

#if defined(__x86_64__)
// Clang before 18 does not take this name in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

bool has_amx_bf16() {
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kAmxBf16) != 0 && (d & kAmxTile) != 0;
}

// The compiler's check covers the operating system's support of the registers.
#define SQUISH_FEATURE(name, compilers_name)                         \
  Feature {                                                          \
    name, [] { return __builtin_cpu_supports(compilers_name) != 0; } \
  }

template <size_t kFirst, size_t kSecond>
constexpr auto both(const std::array<Feature, kFirst>& first, const std::array<Feature, kSecond>& second) {
  std::array<Feature, kFirst + kSecond> features{};
  std::copy(second.begin(), second.end(), std::copy(first.begin(), first.end(), features.begin()));
  return features;
}

constexpr std::array kAvx2 = {SQUISH_FEATURE("avx2", "avx2"), SQUISH_FEATURE("fma", "fma"), Feature{"f16c", &has_f16c}};
constexpr std::array kAvx512 =
    both(kAvx2, std::array{SQUISH_FEATURE("avx512f", "avx512f"), SQUISH_FEATURE("avx512bw", "avx512bw"),
                           SQUISH_FEATURE("avx512dq", "avx512dq"), SQUISH_FEATURE("avx512vl", "avx512vl")});
constexpr std::array kAvx512Bf16 =
    both(kAvx512, std::array{SQUISH_FEATURE("avx512_bf16", "avx512bf16"), SQUISH_FEATURE("avx512_vnni", "avx512vnni"),
                             SQUISH_FEATURE("avx512vbmi", "avx512vbmi")});
#else
bool has_amx_bf16() { return false; }
#endif

constinit const std::array kPaths = {
    Path{.name = "scalar", .codecs = &kScalarCodecs, .linear = &kScalarLinear},
#if defined(__x86_64__)
    Path{.name = "avx2",
         .needs = kAvx2,
         .codecs = &kAvx2Codecs,
         .linear = &kAvx2Linear,
         .linear_int16 = &kAvx2Int16Linear},
    Path{.name = "avx512", .needs = kAvx512, .codecs = &kAvx512Codecs, .linear = &kAvx512Linear},
    Path{.name = "avx512_bf16",
         .needs = kAvx512Bf16,
         .codecs = &kAvx512Codecs,
         .linear = &kAvx512Linear,
         .linear_bfloat16 = &kAvx512Bf16Linear},
#else
    Path{.name = "avx2"},
    Path{.name = "avx512"},
    Path{.name = "avx512_bf16"},
#endif
};

bool this_cpu_has(const Path& path) {
  return path.codecs != nullptr &&
         std::all_of(path.needs.begin(), path.needs.end(), [](const Feature& feature) { return feature.is_there(); });
}

Selection select() {
  const Path* scalar = &kPaths.front();
  const Path* best = &*std::find_if(kPaths.rbegin(), kPaths.rend(), this_cpu_has);
  const char* wanted = std::getenv("SQUISH_NF4_ISA");
  if (wanted == nullptr || *wanted == '\0') return {best, has_amx_bf16(), ""};
  for (const Path& path : kPaths) {
    if (std::string_view(wanted) != path.name) continue;
    if (this_cpu_has(path)) return {&path, has_amx_bf16(), ""};
    return {
        scalar, has_amx_bf16(),
        std::string("SQUISH_NF4_ISA=") + wanted + " is not supported by this CPU; the best it has is " + best->name};
  }
  return {scalar, has_amx_bf16(), "SQUISH_NF4_ISA must be " + path_names() + ", got '" + wanted + "'"};
}

int64_t ask_for_last_cache() {
  // Not sysconf: on AMD it gives the sum over all caches of the machine, of which a core uses one.
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");  // "32768K"
  int64_t size = 0;
  char unit = 0;
  if (!(file >> size >> unit) || unit != 'K' || size <= 0) return int64_t{32} << 20;
  return size << 10;
}

}  // namespace

std::span<const Path> paths() { return kPaths; }

std::string path_names() {
  std::string names = kPaths.front().name;
  for (size_t i = 1; i < kPaths.size(); ++i)
    names += (i + 1 < kPaths.size() ? ", " : " or ") + std::string(kPaths[i].name);
  return names;
}

const Selection& selection() {
  static const Selection chosen = select();
  return chosen;
}

bool is_available(const Path& path) { return this_cpu_has(path) && &path <= selection().path; }

int64_t last_cache_bytes() {
  static const int64_t bytes = ask_for_last_cache();
  return bytes;
}

}  // namespace squish::cpu
