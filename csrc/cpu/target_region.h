// Everything that must come before a target region, and the region itself: a stretch of a file that is compiled for
// more than the baseline CPU, without compiler flags that would also reach the inline functions of other headers. A std
// function built for AVX-512 could be the copy that the linker keeps for everyone, so what the loops of codec_loops.h
// and linear_loops.h use is included here; a file that needs more includes it before its region begins.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "csrc/cpu/kernels.h"
#include "csrc/cpu/linear.h"
#include "csrc/nf4/codec.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define SQUISH_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define SQUISH_TARGET_REGION(features) \
  SQUISH_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define SQUISH_END_TARGET_REGION _Pragma("clang attribute pop")
#else  // GCC 12 warns about the undefined registers inside its own intrinsics
#define SQUISH_TARGET_REGION(features)                                                           \
  _Pragma("GCC push_options") SQUISH_PRAGMA(GCC target(features)) _Pragma("GCC diagnostic push") \
      _Pragma("GCC diagnostic ignored \"-Wuninitialized\"")                                      \
          _Pragma("GCC diagnostic ignored \"-Wmaybe-uninitialized\"")
#define SQUISH_END_TARGET_REGION _Pragma("GCC diagnostic pop") _Pragma("GCC pop_options")
#endif
#else  // elsewhere a path uses what every processor of its architecture has, as arm64 has NEON
#define SQUISH_TARGET_REGION(features)
#define SQUISH_END_TARGET_REGION
#endif
