// The linear layer in bfloat16 where the processor multiplies it (AVX512_BF16): two products and their sum in one
// instruction, added to a float32. 64 columns a step. Everything else of the avx512_bf16 path is that of avx512.
#if defined(__x86_64__)

#include "csrc/cpu/target_region.h"

SQUISH_TARGET_REGION("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#include "csrc/cpu/avx512.h"
#include "csrc/cpu/linear_loops.h"

namespace squish::cpu {
namespace {

static_assert(nf4::kEvenColumnShift == 0 && nf4::kOddColumnShift == 4, "the shifts below assume this nibble order");

// The sixteen levels times the scale, rounded to nearest even. Subnormal ones become zero, as in any product of this
// instruction set.
inline __m256i scaled_levels(float scale) {
  const __m512 product = _mm512_mul_ps(_mm512_loadu_ps(nf4::kCodebook.level), _mm512_set1_ps(scale));
  return (__m256i)_mm512_cvtneps_pbh(product);
}

struct Avx512BFloats {
  using Element = BFloat16;
  using Operand = __m512i;
  using Sum = __m512;
  static constexpr int64_t kLanes = 32;
  static constexpr int kBlock = 6, kFew = 4;
  struct OneGroup {
    __m512i level;  // twice: vpermw looks up the low five bits of a lane
    OneGroup() = default;
    explicit OneGroup(float scale) : level(_mm512_broadcast_i64x4(scaled_levels(scale))) {}
  };
  struct TwoGroups {
    __m512i level;
    TwoGroups(float a, float b)
        : level(_mm512_inserti64x4(_mm512_castsi256_si512(scaled_levels(a)), scaled_levels(b), 1)) {}
  };
  // Decoded in float32, in two halves of sixteen lanes.
  struct Lanes {
    avx512::Lanes low, high;
    int64_t to_high;  // groups
    explicit Lanes(const GroupCursor& cursor) : Lanes(cursor, next_half(cursor)) {}
    Lanes(const GroupCursor& first, const GroupCursor& second)
        : low(first), high(second), to_high(second.group - first.group) {}
    static GroupCursor next_half(GroupCursor cursor) {
      advance(cursor, kLanes);
      return cursor;
    }
  };
  struct LaneScales {
    avx512::LaneScales low, high;
    LaneScales(const float* scales, const Lanes& lanes)
        : low(scales, lanes.low), high(scales + lanes.to_high, lanes.high) {}
  };

  static __m512i load_bytes(const uint8_t* packed) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
  }
  // The second half of the lanes looks up the second half of the table.
  static __m512i choose_table(__m512i index) {
    const __m512i nibble = _mm512_set1_epi16(nf4::kNibbleMask);
    const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(nf4::kLevelCount), 1);
    return _mm512_ternarylogic_epi32(index, nibble, second, 0xea);  // (index & nibble) | second
  }
  static void decode(const uint8_t* packed, const OneGroup& levels, __m512i& even, __m512i& odd) {
    const __m512i byte = load_bytes(packed);
    even = _mm512_permutexvar_epi16(byte, levels.level);
    odd = _mm512_permutexvar_epi16(_mm512_srli_epi16(byte, nf4::kOddColumnShift), levels.level);
  }
  static void decode(const uint8_t* packed, const TwoGroups& levels, __m512i& even, __m512i& odd) {
    const __m512i byte = load_bytes(packed);
    even = _mm512_permutexvar_epi16(choose_table(byte), levels.level);
    odd = _mm512_permutexvar_epi16(choose_table(_mm512_srli_epi16(byte, nf4::kOddColumnShift)), levels.level);
  }
  static void decode(const uint8_t* packed, const LaneScales& scales, __m512i& even, __m512i& odd) {
    __m512 low_even, low_odd, high_even, high_odd;
    avx512::decode(packed, scales.low, low_even, low_odd);
    avx512::decode(packed + kLanes / 2, scales.high, high_even, high_odd);
    even = (__m512i)_mm512_cvtne2ps_pbh(high_even, low_even);
    odd = (__m512i)_mm512_cvtne2ps_pbh(high_odd, low_odd);
  }
  static void split(const BFloat16* x, BFloat16* even, BFloat16* odd) {
    const __m512i low = _mm512_loadu_si512(x), high = _mm512_loadu_si512(x + kLanes);
    const __m512i bits = _mm512_set1_epi32(0xffff);
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);  // packus interleaves the two by 128 bits
    const __m512i first = _mm512_packus_epi32(_mm512_and_si512(low, bits), _mm512_and_si512(high, bits));
    const __m512i second = _mm512_packus_epi32(_mm512_srli_epi32(low, 16), _mm512_srli_epi32(high, 16));
    _mm512_storeu_si512(even, _mm512_permutexvar_epi64(order, first));
    _mm512_storeu_si512(odd, _mm512_permutexvar_epi64(order, second));
  }

  static Sum zero() { return _mm512_setzero_ps(); }
  static __m512i load(const BFloat16* x) { return _mm512_loadu_si512(x); }
  static void store(BFloat16* to, __m512i x) { _mm512_storeu_si512(to, x); }
  static Sum multiply_add(__m512i a, __m512i b, Sum sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
  static Four totals(Sum a, Sum b, Sum c, Sum d) { return avx512::totals(a, b, c, d); }
};

}  // namespace

constinit const LinearKernels<BFloat16> kAvx512Bf16Linear = linear_kernels_of<Avx512BFloats, BFloat16>();

}  // namespace squish::cpu
SQUISH_END_TARGET_REGION

#endif
