// The codec on AVX2 (with FMA and F16C): eight columns a step; what is left of a group goes through the plain codec.
#if defined(__x86_64__)

#include "csrc/cpu/target_region.h"

SQUISH_TARGET_REGION("avx2,fma,f16c")
#include "csrc/cpu/avx2.h"
#include "csrc/cpu/codec_loops.h"

namespace squish::cpu {
namespace {

using avx2::look_up;
using avx2::Table;

static_assert(nf4::kEvenColumnShift == 0 && nf4::kOddColumnShift == 4, "the shifts below assume this nibble order");

// Eight weights as float32.
inline __m256 load(const float* w) { return _mm256_loadu_ps(w); }
inline __m256 load(const BFloat16* w) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 load(const Float16* w) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))); }
inline __m256 load(const double* w) {
  return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(w + 4)), _mm256_cvtpd_ps(_mm256_loadu_pd(w)));
}

// All ones where quotient > boundary; false for a NaN.
inline __m256i above(__m256 quotient, __m256 boundary) {
  return _mm256_castps_si256(_mm256_cmp_ps(quotient, boundary, _CMP_GT_OQ));
}
// 2 * prefix + 1 where the mask is set (all ones is -1).
inline __m256i append_bit(__m256i prefix, __m256i mask) {
  return _mm256_sub_epi32(_mm256_add_epi32(prefix, prefix), mask);
}

// Counts the boundaries below each quotient by binary search: four comparisons, the boundary of each step looked up
// by the bits found so far.
inline __m256i nearest_levels(__m256 q) {
  const auto& b = nf4::kBoundaries;
  const __m256 third = _mm256_setr_ps(b[1], b[5], b[9], b[13], 0, 0, 0, 0);
  const __m256 fourth = _mm256_setr_ps(b[0], b[2], b[4], b[6], b[8], b[10], b[12], b[14]);
  const __m256i upper_half = above(q, _mm256_set1_ps(b[7]));
  const __m256 second = _mm256_blendv_ps(_mm256_set1_ps(b[3]), _mm256_set1_ps(b[11]), _mm256_castsi256_ps(upper_half));
  __m256i index = append_bit(_mm256_sub_epi32(_mm256_setzero_si256(), upper_half), above(q, second));
  index = append_bit(index, above(q, _mm256_permutevar8x32_ps(third, index)));
  return append_bit(index, above(q, _mm256_permutevar8x32_ps(fourth, index)));
}

// The sixteen levels times the scale.
inline __m256 scaled(const float* levels, __m256 scale) {
  const __m256 product = _mm256_mul_ps(_mm256_loadu_ps(levels), scale);
  const __m256 is_nan = _mm256_cmp_ps(product, product, _CMP_UNORD_Q);
  return _mm256_blendv_ps(product, _mm256_set1_ps(nf4::quiet_nan()), is_nan);
}
inline Table scaled_levels(float scale) {
  const __m256 s = _mm256_set1_ps(scale);
  return {scaled(nf4::kCodebook.level, s), scaled(nf4::kCodebook.level + 8, s)};
}

// Sixteen rounded values as two planes of bytes, for pshufb.
struct BytePlanes {
  __m128i low, high;
};
template <typename T>
inline BytePlanes byte_planes(float scale) {
  alignas(16) uint8_t low[16], high[16];
  for (uint32_t k = 0; k < 16; ++k) {
    const uint16_t bits = nf4::decode<T>(k, scale, nf4::kCodebook.level).bits;
    low[k] = static_cast<uint8_t>(bits);
    high[k] = static_cast<uint8_t>(bits >> 8);
  }
  return {_mm_load_si128(reinterpret_cast<const __m128i*>(low)),
          _mm_load_si128(reinterpret_cast<const __m128i*>(high))};
}

template <Stores kStores>
inline void store(float* to, __m256 x) {
  if constexpr (kStores == Stores::kPastCaches) {
    _mm256_stream_ps(to, x);
  } else {
    _mm256_storeu_ps(to, x);
  }
}
template <Stores kStores>
inline void store(void* to, __m128i x) {
  if constexpr (kStores == Stores::kPastCaches) {
    _mm_stream_si128(static_cast<__m128i*>(to), x);
  } else {
    _mm_storeu_si128(static_cast<__m128i*>(to), x);
  }
}

struct Avx2Path {
  template <typename T>
  static uint32_t absmax_bits(const T* w, int64_t count) {
    const __m256i magnitude = _mm256_set1_epi32(static_cast<int>(nf4::kMagnitudeMask));
    __m256i largest = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
      largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(load(w + i)), magnitude));
    __m128i four = _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(1, 0, 3, 2)));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(2, 3, 0, 1)));
    return nf4::larger(static_cast<uint32_t>(_mm_cvtsi128_si32(four)), nf4::absmax_bits(w + i, count - i));
  }

  template <typename T>
  static void encode_pairs(const T* w, int64_t count, float scale, uint8_t* packed) {
    const __m256 divisor = _mm256_set1_ps(scale);
    const __m256i first_bytes = _mm256_setr_epi8(0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                                 0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      const __m256i index = nearest_levels(_mm256_div_ps(load(w + i), divisor));
      // In each 64-bit lane: the even column's index in bits 0-3, the odd one's in bits 32-35; bring it to bits 4-7.
      const __m256i byte = _mm256_or_si256(index, _mm256_srli_epi64(index, 32 - nf4::kOddColumnShift));
      const __m256i two_and_two = _mm256_shuffle_epi8(byte, first_bytes);
      const __m128i four =
          _mm_unpacklo_epi16(_mm256_castsi256_si128(two_and_two), _mm256_extracti128_si256(two_and_two, 1));
      const int32_t bytes = _mm_cvtsi128_si32(four);
      std::memcpy(packed + i / 2, &bytes, sizeof bytes);
    }
    nf4::encode_pairs(w + i, count - i, scale, nf4::kCodebook.boundary, packed + i / 2);
  }

  template <Stores kStores>
  static void decode_pairs(const uint8_t* packed, int64_t count, float scale, float* out) {
    const Table table = scaled_levels(scale);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      int32_t bytes;
      std::memcpy(&bytes, packed + i / 2, sizeof bytes);
      const __m256i pair = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes));
      const __m256i index = _mm256_or_si256(pair, _mm256_slli_epi64(pair, 32 - nf4::kOddColumnShift));
      store<kStores>(out + i, look_up(table, index));
    }
    nf4::decode_pairs(packed + i / 2, count - i, scale, nf4::kCodebook.level, out + i);
  }

  template <Stores kStores, typename T>
  static void decode_pairs(const uint8_t* packed, int64_t count, float scale, T* out) {
    if (count < 16) return nf4::decode_pairs(packed, count, scale, nf4::kCodebook.level, out);
    const BytePlanes planes = byte_planes<T>(scale);
    const __m128i nibble = _mm_set1_epi8(static_cast<char>(nf4::kNibbleMask));
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + i / 2));
      const __m128i even = _mm_and_si128(bytes, nibble);
      const __m128i odd = _mm_and_si128(_mm_srli_epi16(bytes, nf4::kOddColumnShift), nibble);
      const __m128i index = _mm_unpacklo_epi8(even, odd);
      const __m128i low = _mm_shuffle_epi8(planes.low, index), high = _mm_shuffle_epi8(planes.high, index);
      store<kStores>(out + i, _mm_unpacklo_epi8(low, high));
      store<kStores>(out + i + 8, _mm_unpackhi_epi8(low, high));
    }
    nf4::decode_pairs(packed + i / 2, count - i, scale, nf4::kCodebook.level, out + i);
  }

  static void fence() { _mm_sfence(); }

  // A difference is rounded to float32 once; squares of float32 are exact in float64, fused or not.
  struct Survey {
    __m256d sum[4], square[4], error[4];
    Survey() {
      for (int quarter = 0; quarter < 4; ++quarter)
        sum[quarter] = square[quarter] = error[quarter] = _mm256_setzero_pd();
    }
    template <typename T>
    void add(const T* w, const float* decoded) {
      for (int half = 0; half < 2; ++half) {
        const __m256 exact = load(w + 8 * half);
        const __m256 difference = _mm256_sub_ps(exact, _mm256_loadu_ps(decoded + 8 * half));
        for (int part = 0; part < 2; ++part) {
          const int quarter = 2 * half + part;
          const __m256d value = widened(exact, part), lost = widened(difference, part);
          sum[quarter] = _mm256_add_pd(sum[quarter], _mm256_andnot_pd(_mm256_set1_pd(-0.0), value));
          square[quarter] = _mm256_fmadd_pd(value, value, square[quarter]);
          error[quarter] = _mm256_fmadd_pd(lost, lost, error[quarter]);
        }
      }
    }
    static __m256d widened(__m256 x, int part) {
      return _mm256_cvtps_pd(part == 0 ? _mm256_castps256_ps128(x) : _mm256_extractf128_ps(x, 1));
    }
    void store(double* sums, double* squares, double* errors) const {
      for (int quarter = 0; quarter < 4; ++quarter) {
        _mm256_storeu_pd(sums + 4 * quarter, sum[quarter]);
        _mm256_storeu_pd(squares + 4 * quarter, square[quarter]);
        _mm256_storeu_pd(errors + 4 * quarter, error[quarter]);
      }
    }
  };
};

}  // namespace

constinit const Codecs kAvx2Codecs = codecs_of<Avx2Path>();

}  // namespace squish::cpu
SQUISH_END_TARGET_REGION

#endif
