// What the AVX2 files share. Included inside their target regions, and therefore with internal linkage.
#pragma once

namespace squish::cpu::avx2 {

// The total of each of four registers, in this order.
static inline __m128 totals(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}

}  // namespace squish::cpu::avx2
