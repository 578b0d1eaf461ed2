// The CPU paths there are, and the one that this process computes by.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <tuple>

#include "csrc/cpu/kernels.h"
#include "csrc/cpu/linear.h"

namespace squish::cpu {

#define SQUISH_EXPORT __attribute__((visibility("default")))

// What a processor may have, by the name that Linux gives it in /proc/cpuinfo.
struct Feature {
  const char* name;
  bool (*is_there)();
};

// A row of the table in dispatch.cpp, the one place that names the paths.
struct Path {
  const char* name;                     // as SQUISH_NF4_ISA takes it
  std::span<const Feature> needs = {};  // every feature that the kernels below use
  const Codecs* codecs = nullptr;       // null: a path of another architecture, of which only the name is known
  const LinearKernels<float>* linear = nullptr;              // null only where codecs is
  const LinearKernels<BFloat16>* linear_bfloat16 = nullptr;  // null where the processor does not multiply bfloat16
  const LinearKernels<int16_t>* linear_int16 = nullptr;      // null where it would gain nothing

  template <typename T>
  const Codec<T>& codec() const {
    return std::get<Codec<T>>(*codecs);
  }
};

// All paths. Those of one architecture ascend: of the ones that a processor has, the last is the best.
SQUISH_EXPORT std::span<const Path> paths();

// "scalar, avx2, avx512 or avx512_bf16"
SQUISH_EXPORT std::string path_names();

struct Selection {
  const Path* path;   // one that this processor has
  bool has_amx;       // bfloat16 tiles (AMX_BF16): not used here, but by the library that torch multiplies with
  std::string error;  // not empty: SQUISH_NF4_ISA names something unknown or missing, and nothing may be computed
};

// The path for this process: the best one the CPU has, or the one that SQUISH_NF4_ISA names. Decided at the first call.
SQUISH_EXPORT const Selection& selection();

// Whether this processor has what the path needs, and the path is no later row of the table than the selected one.
SQUISH_EXPORT bool is_available(const Path& path);

// Bytes of the cache that all of this processor's cores, or a part of them, share; a guess where it cannot be asked.
SQUISH_EXPORT int64_t last_cache_bytes();

}  // namespace squish::cpu
