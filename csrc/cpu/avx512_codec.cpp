// The codec on AVX-512 (F, BW, DQ, VL): sixteen columns a step, tails by mask.
#if defined(__x86_64__)

#include "csrc/cpu/bucket_index.h"
#include "csrc/cpu/target_region.h"

SQUISH_TARGET_REGION("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "csrc/cpu/avx512.h"
#include "csrc/cpu/codec_loops.h"

namespace squish::cpu {
namespace {

static_assert(nf4::kEvenColumnShift == 0 && nf4::kOddColumnShift == 4, "the shifts below assume this nibble order");

using avx512::first_lanes;

// Sixteen weights as float32; lanes outside the mask are zero and are not read.
inline __m512 load(const float* w, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, w); }
inline __m512 load(const BFloat16* w, __mmask16 lanes) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, w));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
inline __m512 load(const Float16* w, __mmask16 lanes) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, w)); }
inline __m512 load(const double* w, __mmask16 lanes) {
  const __m256 low = _mm512_cvtpd_ps(_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes), w));
  const __m256 high = _mm512_cvtpd_ps(_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes >> 8), w + 8));
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

// See bucket_index.h. A NaN converts to the smallest integer, whose low five bits say bucket 0, and is above nothing.
inline __m512i nearest_levels(__m512 quotient) {
  const __m512 per_unit = _mm512_set1_ps(kBucketsPerUnit);
  const __m512i bucket = _mm512_min_epi32(_mm512_cvttps_epi32(_mm512_fmadd_ps(quotient, per_unit, per_unit)),
                                          _mm512_set1_epi32(kBucketCount - 1));
  const __m512i first = _mm512_permutex2var_epi32(_mm512_load_si512(kFirstCandidate.data()), bucket,
                                                  _mm512_load_si512(kFirstCandidate.data() + 16));
  const __m512 boundary = _mm512_permutexvar_ps(first, _mm512_load_ps(kNextBoundary.data()));
  const __mmask16 above = _mm512_cmp_ps_mask(quotient, boundary, _CMP_GT_OQ);
  return _mm512_mask_add_epi32(first, above, first, _mm512_set1_epi32(1));
}

// The sixteen levels times the scale: what every column of the group decodes to.
inline __m512 scaled_levels(float scale) {
  const __m512 product = _mm512_mul_ps(_mm512_loadu_ps(nf4::kCodebook.level), _mm512_set1_ps(scale));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(product, product, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(product, is_nan, _mm512_set1_ps(nf4::quiet_nan()));
}

inline __m256i round_to(BFloat16, __m512 x) {  // vcvtneps2bf16 would flush subnormals
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
inline __m256i round_to(Float16, __m512 x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

// Sixteen weights to eight bytes. In each 64-bit lane stands the even column's index in bits 0-3 and the odd one's in
// bits 32-35, which is brought to bits 4-7.
inline __m128i encode_sixteen(__m512 w, __m512 divisor) {
  const __m512i index = nearest_levels(_mm512_div_ps(w, divisor));
  return _mm512_cvtepi64_epi8(_mm512_or_si512(index, _mm512_srli_epi64(index, 32 - nf4::kOddColumnShift)));
}

// Eight bytes to sixteen weights. vpermps reads the low four bits of a lane: the other nibble need not be masked away.
inline __m512 decode_sixteen(__m128i bytes, __m512 table) {
  const __m512i pair = _mm512_cvtepu8_epi64(bytes);
  return _mm512_permutexvar_ps(_mm512_or_si512(pair, _mm512_slli_epi64(pair, 32 - nf4::kOddColumnShift)), table);
}

// Sixteen bytes to 32 weights of 16 bits.
inline __m512i decode_thirty_two(__m128i bytes, __m512i table) {
  const __m512i pair = _mm512_cvtepu8_epi32(bytes);
  return _mm512_permutexvar_epi16(_mm512_or_si512(pair, _mm512_slli_epi32(pair, 16 - nf4::kOddColumnShift)), table);
}

template <Stores kStores>
inline void store(void* to, __m512i x) {
  if constexpr (kStores == Stores::kPastCaches) {
    _mm512_stream_si512(static_cast<__m512i*>(to), x);
  } else {
    _mm512_storeu_si512(to, x);
  }
}

struct Avx512Path {
  template <typename T>
  static uint32_t absmax_bits(const T* w, int64_t count) {
    const __m512i magnitude = _mm512_set1_epi32(static_cast<int>(nf4::kMagnitudeMask));
    __m512i largest = _mm512_setzero_si512();
    const auto take = [&](__m512 weights) {
      largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(weights), magnitude));
    };
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) take(load(w + i, 0xffff));
    if (const __mmask16 rest = first_lanes(count - i); rest != 0) take(load(w + i, rest));
    return _mm512_reduce_max_epu32(largest);
  }

  // The bits of 16-bit magnitudes are ordered as the magnitudes are, NaN above infinity: 32 of them in a register.
  static uint32_t absmax_bits(const BFloat16* w, int64_t count) { return absmax_of_sixteen_bits(w, count); }
  static uint32_t absmax_bits(const Float16* w, int64_t count) { return absmax_of_sixteen_bits(w, count); }
  template <typename T>
  static uint32_t absmax_of_sixteen_bits(const T* w, int64_t count) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    __m512i largest = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + 32 <= count; i += 32)
      largest = _mm512_max_epu16(largest, _mm512_and_si512(_mm512_loadu_si512(w + i), magnitude));
    if (i < count) {
      const __m512i rest = _mm512_maskz_loadu_epi16((__mmask32{1} << (count - i)) - 1, w + i);
      largest = _mm512_max_epu16(largest, _mm512_and_si512(rest, magnitude));
    }
    const __m512i low = _mm512_and_si512(largest, _mm512_set1_epi32(0xffff)), high = _mm512_srli_epi32(largest, 16);
    const uint32_t most = _mm512_reduce_max_epu32(_mm512_max_epu32(low, high));
    return nf4::bits_of(nf4::to_float(T{static_cast<uint16_t>(most)}));
  }

  // Whole steps are stored whole: a masked store costs several times as much on some processors.
  template <typename T>
  static void encode_pairs(const T* w, int64_t count, float scale, uint8_t* packed) {
    const __m512 divisor = _mm512_set1_ps(scale);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
      _mm_storel_epi64(reinterpret_cast<__m128i*>(packed + i / 2), encode_sixteen(load(w + i, 0xffff), divisor));
    if (const __mmask16 rest = first_lanes(count - i); rest != 0)
      _mm_mask_storeu_epi8(packed + i / 2, first_lanes((count - i) / 2), encode_sixteen(load(w + i, rest), divisor));
  }

  template <Stores kStores>
  static void decode_pairs(const uint8_t* packed, int64_t count, float scale, float* out) {
    const __m512 table = scaled_levels(scale);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + i / 2));
      store<kStores>(out + i, _mm512_castps_si512(decode_sixteen(bytes, table)));
    }
    if (const __mmask16 rest = first_lanes(count - i); rest != 0) {
      const __m128i bytes = _mm_maskz_loadu_epi8(first_lanes((count - i) / 2), packed + i / 2);
      _mm512_mask_storeu_ps(out + i, rest, decode_sixteen(bytes, table));
    }
  }

  // The sixteen values of the group are rounded, not the columns. vpermw reads five bits: both halves hold the table.
  template <Stores kStores, typename T>
  static void decode_pairs(const uint8_t* packed, int64_t count, float scale, T* out) {
    const __m512i table = _mm512_broadcast_i64x4(round_to(T{}, scaled_levels(scale)));
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2));
      store<kStores>(out + i, decode_thirty_two(bytes, table));
    }
    if (i < count) {
      const __m128i bytes = _mm_maskz_loadu_epi8(first_lanes((count - i) / 2), packed + i / 2);
      _mm512_mask_storeu_epi16(out + i, (__mmask32{1} << (count - i)) - 1, decode_thirty_two(bytes, table));
    }
  }

  static void fence() { _mm_sfence(); }

  // A difference is rounded to float32 once; squares of float32 are exact in float64, fused or not.
  struct Survey {
    __m512d sum[2], square[2], error[2];
    Survey() {
      for (int half = 0; half < 2; ++half) sum[half] = square[half] = error[half] = _mm512_setzero_pd();
    }
    template <typename T>
    void add(const T* w, const float* decoded) {
      const __m512 exact = load(w, 0xffff), difference = _mm512_sub_ps(exact, _mm512_loadu_ps(decoded));
      for (int half = 0; half < 2; ++half) {
        const __m512d value = widened(exact, half), lost = widened(difference, half);
        sum[half] = _mm512_add_pd(sum[half], _mm512_abs_pd(value));
        square[half] = _mm512_fmadd_pd(value, value, square[half]);
        error[half] = _mm512_fmadd_pd(lost, lost, error[half]);
      }
    }
    static __m512d widened(__m512 x, int half) {
      return _mm512_cvtps_pd(half == 0 ? _mm512_castps512_ps256(x) : _mm512_extractf32x8_ps(x, 1));
    }
    void store(double* sums, double* squares, double* errors) const {
      for (int half = 0; half < 2; ++half) {
        _mm512_storeu_pd(sums + 8 * half, sum[half]);
        _mm512_storeu_pd(squares + 8 * half, square[half]);
        _mm512_storeu_pd(errors + 8 * half, error[half]);
      }
    }
  };
};

}  // namespace

constinit const Codecs kAvx512Codecs = codecs_of<Avx512Path>();

}  // namespace squish::cpu
SQUISH_END_TARGET_REGION

#endif
