// Compiles a stretch of a file for more than the baseline CPU, without compiler flags that would also reach the inline
// functions of other headers: a std function built for AVX-512 could be the copy that the linker keeps for everyone.
// Include every other header first; <immintrin.h> comes from here.
#pragma once

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
#endif
