// What the AVX2 files share. Included inside their target regions, and therefore with internal linkage.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/cpu/group_cursor.h"

namespace squish::cpu::avx2 {
namespace {

// A value for each of the sixteen levels, in two registers.
struct Table {
  __m256 low, high;
};

// Looks up the low four bits of each lane: vpermps reads three of them, the fourth chooses between the halves.
inline __m256 look_up(const Table& table, __m256i index) {
  const __m256 choose_high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index), _mm256_permutevar8x32_ps(table.high, index),
                          choose_high);
}

// The total of each of four registers, in this order.
inline __m128 totals(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}

// The groups of eight lanes of two columns, where they are not all of one. See linear_loops.h.
struct Lanes {
  __m256i even, odd;  // the groups of a lane's two columns, counted from the cursor's: less than 16
  __m256 inside;      // all ones in the lanes whose columns the row has
  int64_t bytes;      // of a row, for these lanes
  int64_t groups;     // touched

  explicit Lanes(const GroupCursor& cursor)
      : bytes(std::min<int64_t>((cursor.columns - cursor.column) / 2, 8)), groups(groups_touched(cursor, 2 * bytes)) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), one = _mm256_set1_epi32(1);
    const __m256i is_inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(bytes)), lane);
    inside = _mm256_castsi256_ps(is_inside);
    const int to_second = columns_to_second_group(cursor);
    const __m256 distance =
        _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_add_epi32(lane, lane), _mm256_set1_epi32(to_second)));
    const auto group_of = [&](float further) {
      const __m256 quotient =
          _mm256_mul_ps(_mm256_add_ps(distance, _mm256_set1_ps(further)), _mm256_set1_ps(cursor.per_column));
      const __m256i group = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_floor_ps(quotient)), one);
      return _mm256_and_si256(group, is_inside);
    };
    even = group_of(0.5f);
    odd = group_of(1.5f);
  }
};

struct LaneScales {
  __m256 even, odd;
  int64_t bytes;

  LaneScales(const float* scales, const Lanes& lanes) : bytes(lanes.bytes) {
    if (lanes.groups <= 2) {
      const __m256 first = _mm256_broadcast_ss(scales), second = _mm256_broadcast_ss(scales + lanes.groups - 1);
      even = choose(first, second, lanes.even);
      odd = choose(first, second, lanes.odd);
    } else {
      even = gather(scales, lanes.even);
      odd = gather(scales, lanes.odd);
    }
    even = _mm256_and_ps(even, lanes.inside);
    odd = _mm256_and_ps(odd, lanes.inside);
  }
  // Eight loads, not vgatherdps: where that is fast (AMD's Zen 4) a layer of such groups gains 7 % at most, and Intel's
  // microcode against Gather Data Sampling makes it slow.
  __attribute__((noinline)) static __m256 gather(const float* scales, __m256i group) {
    alignas(32) int32_t at[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(at), group);
    return _mm256_setr_ps(scales[at[0]], scales[at[1]], scales[at[2]], scales[at[3]], scales[at[4]], scales[at[5]],
                          scales[at[6]], scales[at[7]]);
  }
  static __m256 choose(__m256 first, __m256 second, __m256i group) {
    return _mm256_blendv_ps(first, second, _mm256_castsi256_ps(_mm256_slli_epi32(group, 31)));
  }
};

}  // namespace
}  // namespace squish::cpu::avx2
