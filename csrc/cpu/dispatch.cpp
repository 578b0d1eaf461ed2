// Chooses the CPU path once, by what the CPU has and what SQUISH_NF4_ISA allows.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <array>
#include <cstdlib>
#include <string_view>
#include <utility>

#include "csrc/cpu/kernels.h"

namespace squish::cpu {
namespace {

constexpr std::array<const char*, 4> kNames = {"scalar", "avx2", "avx512", "avx512_bf16"};

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
#else
bool has_amx_bf16() { return false; }
#endif

// Every feature a path uses is asked for by name (the check covers the operating system's support of the registers).
Isa best_of_this_cpu() {
#if defined(__x86_64__)
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())) return Isa::kScalar;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")))
    return Isa::kAvx2;
  if (!(__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("avx512vbmi")))
    return Isa::kAvx512;
  return Isa::kAvx512Bf16;
#else
  return Isa::kScalar;
#endif
}

const Kernels& kernels_of(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return kAvx512Kernels;
  if (isa == Isa::kAvx2) return kAvx2Kernels;
#endif
  (void)isa;
  return kScalarKernels;
}

const LinearKernels<BFloat16>* linear_bfloat16_of(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512Bf16) return &kAvx512Bf16Linear;
#endif
  (void)isa;
  return nullptr;
}

const LinearKernels<int16_t>* linear_int16_of(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx2) return &kAvx2Int16Linear;
#endif
  (void)isa;
  return nullptr;
}

Selection selection_of(Isa isa, std::string error = "") {
  return {&kernels_of(isa), linear_bfloat16_of(isa), linear_int16_of(isa), isa, has_amx_bf16(), std::move(error)};
}

Selection select() {
  const Isa best = best_of_this_cpu();
  const char* wanted = std::getenv("SQUISH_NF4_ISA");
  if (wanted == nullptr || *wanted == '\0') return selection_of(best);
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (std::string_view(wanted) != kNames[i]) continue;
    const auto isa = static_cast<Isa>(i);
    if (isa <= best) return selection_of(isa);
    return selection_of(Isa::kScalar, std::string("SQUISH_NF4_ISA=") + wanted +
                                          " is not supported by this CPU; the best it has is " + isa_name(best));
  }
  return selection_of(Isa::kScalar,
                      std::string("SQUISH_NF4_ISA must be scalar, avx2, avx512 or avx512_bf16, got '") + wanted + "'");
}

}  // namespace

const Selection& selection() {
  static const Selection chosen = select();
  return chosen;
}

const char* isa_name(Isa isa) { return kNames[static_cast<size_t>(isa)]; }

}  // namespace squish::cpu
