// The linear layer in float32 on AVX2 (with FMA and F16C): eight lanes, sixteen columns a step.
#if defined(__x86_64__)

#include "csrc/cpu/target_region.h"

SQUISH_TARGET_REGION("avx2,fma,f16c")
#include "csrc/cpu/avx2.h"
#include "csrc/cpu/linear_loops.h"

namespace squish::cpu {
namespace {

using avx2::look_up;
using avx2::Table;

static_assert(nf4::kEvenColumnShift == 0 && nf4::kOddColumnShift == 4, "the shifts below assume this nibble order");

struct Avx2Floats {
  using Element = float;
  using Operand = __m256;
  using Sum = __m256;
  static constexpr int64_t kLanes = 8;
  static constexpr int kBlock = 2, kFew = 1;
  struct OneGroup {
    __m256 low, high;
    OneGroup() = default;
    explicit OneGroup(float scale) {
      low = _mm256_mul_ps(_mm256_loadu_ps(nf4::kCodebook.level), _mm256_set1_ps(scale));
      high = _mm256_mul_ps(_mm256_loadu_ps(nf4::kCodebook.level + 8), _mm256_set1_ps(scale));
    }
  };
  struct TwoGroups {
    __m256 scale;
    TwoGroups(float a, float b) : scale(_mm256_set_m128(_mm_set1_ps(b), _mm_set1_ps(a))) {}
  };
  using Lanes = avx2::Lanes;
  using LaneScales = avx2::LaneScales;

  static Table unscaled() { return {_mm256_loadu_ps(nf4::kCodebook.level), _mm256_loadu_ps(nf4::kCodebook.level + 8)}; }
  static void decode(__m128i bytes, const Table& table, __m256& even, __m256& odd) {
    const __m256i byte = _mm256_cvtepu8_epi32(bytes);
    even = look_up(table, byte);
    odd = look_up(table, _mm256_srli_epi32(byte, nf4::kOddColumnShift));
  }
  static void decode(const uint8_t* packed, const OneGroup& levels, __m256& even, __m256& odd) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed));
    decode(bytes, Table{levels.low, levels.high}, even, odd);
  }
  static void decode(const uint8_t* packed, const TwoGroups& groups, __m256& even, __m256& odd) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed));
    decode(bytes, unscaled(), even, odd);
    even = _mm256_mul_ps(even, groups.scale);
    odd = _mm256_mul_ps(odd, groups.scale);
  }
  static void decode(const uint8_t* packed, const LaneScales& scales, __m256& even, __m256& odd) {
    uint64_t bytes = 0;
    if (scales.bytes == sizeof bytes) {
      std::memcpy(&bytes, packed, sizeof bytes);
    } else {
      std::memcpy(&bytes, packed, static_cast<size_t>(scales.bytes));
    }
    decode(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)), unscaled(), even, odd);
    even = _mm256_mul_ps(even, scales.even);
    odd = _mm256_mul_ps(odd, scales.odd);
  }
  static Sum zero() { return _mm256_setzero_ps(); }
  static __m256 load(const float* x) { return _mm256_loadu_ps(x); }
  static void store(float* to, __m256 x) { _mm256_storeu_ps(to, x); }
  static Sum multiply_add(__m256 a, __m256 b, Sum sum) { return _mm256_fmadd_ps(a, b, sum); }
  static Four totals(Sum a, Sum b, Sum c, Sum d) { return avx2::totals(a, b, c, d); }
};

}  // namespace

constinit const LinearKernels<float> kAvx2Linear = linear_kernels_of<Avx2Floats, float, BFloat16, Float16>();

}  // namespace squish::cpu
SQUISH_END_TARGET_REGION

#endif
