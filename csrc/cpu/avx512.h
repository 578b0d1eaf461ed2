// What the AVX-512 files share. Included inside their target regions, and therefore with internal linkage.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/cpu/group_cursor.h"
#include "csrc/nf4/codebook.h"

namespace squish::cpu::avx512 {
namespace {

// The total of each of four registers, in this order. Each addition halves the lanes of two registers at once, so that
// four totals cost little more than one.
inline __m128 totals(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? __mmask16{0xffff} : count <= 0 ? __mmask16{0} : static_cast<__mmask16>((1u << count) - 1);
}

// The groups of sixteen lanes of two columns, where they are not all of one. See linear_loops.h.
struct Lanes {
  __m512i even, odd;    // the groups of a lane's two columns, counted from the cursor's: less than 32
  __mmask16 low, high;  // of these 32 groups, the ones there are
  __mmask16 inside;     // the lanes whose columns the row has

  explicit Lanes(const GroupCursor& cursor) {
    const int64_t groups = groups_touched(cursor, 32);
    low = first_lanes(groups);
    high = first_lanes(groups - 16);
    inside = first_lanes((cursor.columns - cursor.column) / 2);
    const int to_second = columns_to_second_group(cursor);
    const __m512i lane = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512 distance = _mm512_cvtepi32_ps(_mm512_sub_epi32(lane, _mm512_set1_epi32(to_second)));
    const auto group_of = [&](float further) {
      const __m512 quotient =
          _mm512_mul_ps(_mm512_add_ps(distance, _mm512_set1_ps(further)), _mm512_set1_ps(cursor.per_column));
      return _mm512_add_epi32(_mm512_cvt_roundps_epi32(quotient, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC),
                              _mm512_set1_epi32(1));
    };
    even = group_of(0.5f);
    odd = group_of(1.5f);
  }
};

struct LaneScales {
  __m512 even, odd;
  __mmask16 inside;

  LaneScales(const float* scales, const Lanes& lanes) : inside(lanes.inside) {
    const __m512 low = _mm512_maskz_loadu_ps(lanes.low, scales);
    if (lanes.high == 0) {
      even = _mm512_maskz_permutexvar_ps(inside, lanes.even, low);
      odd = _mm512_maskz_permutexvar_ps(inside, lanes.odd, low);
    } else {
      const __m512 high = _mm512_maskz_loadu_ps(lanes.high, scales + 16);
      even = _mm512_maskz_permutex2var_ps(inside, low, lanes.even, high);
      odd = _mm512_maskz_permutex2var_ps(inside, low, lanes.odd, high);
    }
  }
};

// Sixteen bytes to levels, of the even and of the odd columns.
inline void look_up(__m128i bytes, __m512 level, __m512& even, __m512& odd) {
  const __m512i byte = _mm512_cvtepu8_epi32(bytes);
  even = _mm512_permutexvar_ps(byte, level);
  odd = _mm512_permutexvar_ps(_mm512_srli_epi32(byte, nf4::kOddColumnShift), level);
}

inline void decode(const uint8_t* packed, const LaneScales& scales, __m512& even, __m512& odd) {
  look_up(_mm_maskz_loadu_epi8(scales.inside, packed), _mm512_loadu_ps(nf4::kCodebook.level), even, odd);
  even = _mm512_mul_ps(even, scales.even);
  odd = _mm512_mul_ps(odd, scales.odd);
}

}  // namespace
}  // namespace squish::cpu::avx512
