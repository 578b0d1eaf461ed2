// The linear layer in float32 on AVX-512 (F, BW, DQ, VL): sixteen lanes, 32 columns a step.
#if defined(__x86_64__)

#include "csrc/cpu/target_region.h"

SQUISH_TARGET_REGION("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "csrc/cpu/avx512.h"
#include "csrc/cpu/linear_loops.h"

namespace squish::cpu {
namespace {

static_assert(nf4::kEvenColumnShift == 0 && nf4::kOddColumnShift == 4, "the shifts below assume this nibble order");

struct Avx512Floats {
  using Element = float;
  using Operand = __m512;
  using Sum = __m512;
  static constexpr int64_t kLanes = 16;
  static constexpr int kBlock = 6, kFew = 4;
  struct OneGroup {
    __m512 level;
    OneGroup() = default;
    explicit OneGroup(float scale)
        : level(_mm512_mul_ps(_mm512_loadu_ps(nf4::kCodebook.level), _mm512_set1_ps(scale))) {}
  };
  struct TwoGroups {
    __m512 scale;
    TwoGroups(float a, float b) : scale(_mm512_mask_mov_ps(_mm512_set1_ps(a), 0xff00, _mm512_set1_ps(b))) {}
  };
  using Lanes = avx512::Lanes;
  using LaneScales = avx512::LaneScales;

  static void decode(const uint8_t* packed, const OneGroup& levels, __m512& even, __m512& odd) {
    avx512::look_up(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)), levels.level, even, odd);
  }
  static void decode(const uint8_t* packed, const TwoGroups& groups, __m512& even, __m512& odd) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
    avx512::look_up(bytes, _mm512_loadu_ps(nf4::kCodebook.level), even, odd);
    even = _mm512_mul_ps(even, groups.scale);
    odd = _mm512_mul_ps(odd, groups.scale);
  }
  static void decode(const uint8_t* packed, const LaneScales& scales, __m512& even, __m512& odd) {
    avx512::decode(packed, scales, even, odd);
  }
  static void split(const float* x, float* even, float* odd) {
    const __m512i first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(1));
    const __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + kLanes);
    _mm512_storeu_ps(even, _mm512_permutex2var_ps(low, first, high));
    _mm512_storeu_ps(odd, _mm512_permutex2var_ps(low, second, high));
  }
  static void split(const BFloat16* x, float* even, float* odd) {
    const __m512i pairs = _mm512_loadu_si512(x);
    _mm512_storeu_si512(even, _mm512_slli_epi32(pairs, 16));
    _mm512_storeu_si512(odd, _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static void split(const Float16* x, float* even, float* odd) {
    const __m512i pairs = _mm512_loadu_si512(x);
    _mm512_storeu_ps(even, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs)));
    _mm512_storeu_ps(odd, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16))));
  }

  static Sum zero() { return _mm512_setzero_ps(); }
  static __m512 load(const float* x) { return _mm512_loadu_ps(x); }
  static void store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
  static Sum multiply_add(__m512 a, __m512 b, Sum sum) { return _mm512_fmadd_ps(a, b, sum); }
  static Four totals(Sum a, Sum b, Sum c, Sum d) { return avx512::totals(a, b, c, d); }
};

}  // namespace

constinit const LinearKernels<float> kAvx512Linear = linear_kernels_of<Avx512Floats, float, BFloat16, Float16>();

}  // namespace squish::cpu
SQUISH_END_TARGET_REGION

#endif
