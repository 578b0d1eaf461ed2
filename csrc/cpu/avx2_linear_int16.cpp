// Few 16-bit activations on AVX2, multiplied in int16: two byte look-ups make a level, one instruction multiplies and
// adds pairs. Up to twice as fast as the float32 registers of avx2_linear.cpp, and far more exact than bfloat16
// (docs/numerics.md).
//
// Levels are kLevelOne-ths and activations kActivationOne-ths of the largest magnitude of their 64 columns. A lane adds
// eight products of a step in int32, then goes to float32 with both scales.
#if defined(__x86_64__)

#include <array>
#include <cmath>

#include "csrc/cpu/target_region.h"

namespace squish::cpu::avx2 {
namespace {

constexpr int64_t kStep = 64;
constexpr int kMostActivations = 4;
constexpr int64_t kScaleElements = sizeof(float) / sizeof(int16_t);  // after the activations of each step: their scale
constexpr int32_t kLevelOne = 1 << 14, kActivationOne = 1 << 13;     // powers of two: small whole numbers are exact
static_assert(int64_t{8} * kLevelOne * kActivationOne < int64_t{1} << 31, "eight products fit an int32");

constexpr std::array<uint8_t, 16> bytes_of_levels(int shift) {
  std::array<uint8_t, 16> bytes{};
  for (int k = 0; k < nf4::kLevelCount; ++k) {
    const float scaled = nf4::kLevels[k] * static_cast<float>(kLevelOne);
    const auto rounded = static_cast<int32_t>(scaled + (scaled < 0 ? -0.5f : 0.5f));
    bytes[k] = static_cast<uint8_t>(static_cast<uint32_t>(rounded) >> shift & 0xff);
  }
  return bytes;
}
alignas(16) constexpr std::array<uint8_t, 16> kLowBytes = bytes_of_levels(0), kHighBytes = bytes_of_levels(8);

}  // namespace
}  // namespace squish::cpu::avx2

SQUISH_TARGET_REGION("avx2,fma,f16c")
#include "csrc/cpu/avx2.h"
#include "csrc/cpu/linear_loops.h"

namespace squish::cpu::avx2 {
namespace {

static_assert(nf4::kEvenColumnShift == 0 && nf4::kOddColumnShift == 4, "the shifts below assume this nibble order");

inline __m256i broadcast(const std::array<uint8_t, 16>& table) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table.data())));
}

// The levels of a step: of its even columns, then of its odd ones.
struct Levels {
  __m256i half[4];
};

inline void look_up(__m256i index, __m256i* half) {
  const __m256i low = _mm256_shuffle_epi8(broadcast(kLowBytes), index);
  const __m256i high = _mm256_shuffle_epi8(broadcast(kHighBytes), index);
  half[0] = _mm256_unpacklo_epi8(low, high);
  half[1] = _mm256_unpackhi_epi8(low, high);
}

inline Levels decode(const uint8_t* packed) {
  const __m256i nibble = _mm256_set1_epi8(static_cast<char>(nf4::kNibbleMask));
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
  Levels levels;
  look_up(_mm256_and_si256(bytes, nibble), levels.half);
  look_up(_mm256_and_si256(_mm256_srli_epi16(bytes, nf4::kOddColumnShift), nibble), levels.half + 2);
  return levels;
}

// The products of a step, summed in each of eight lanes.
inline __m256 products_of_a_step(const Levels& levels, const int16_t* x) {
  __m256i product[4];
  for (int i = 0; i < 4; ++i)
    product[i] = _mm256_madd_epi16(levels.half[i], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x) + i));
  return _mm256_cvtepi32_ps(
      _mm256_add_epi32(_mm256_add_epi32(product[0], product[1]), _mm256_add_epi32(product[2], product[3])));
}

// Of the step's columns 2j, or 2j + 1, in the order in which `look_up` unpacks them: bytes 0-7, 16-23, 8-15, 24-31.
constexpr int64_t place_of(int64_t j) {
  constexpr int64_t kQuarters[] = {0, 2, 1, 3};
  return kQuarters[j / 8] * 8 + j % 8;
}

template <typename T>
void pack(const T* x, int64_t, int64_t d, int64_t, int64_t columns, int16_t* out) {  // a block is one activation
  for (int64_t start = 0; start < columns; start += kStep, out += kStep + kScaleElements) {
    float value[kStep] = {}, largest = 0;
    const int64_t count = d - start < kStep ? d - start : kStep;
    for (int64_t i = 0; i < count; ++i) {
      value[i] = nf4::to_float(x[start + i]);
      largest = largest < std::fabs(value[i]) ? std::fabs(value[i]) : largest;
    }
    const double units = largest == 0 ? 0.0 : kActivationOne / static_cast<double>(largest);
    for (int64_t i = 0; i < kStep; ++i)
      out[i % 2 * (kStep / 2) + place_of(i / 2)] =
          static_cast<int16_t>(std::lrint(static_cast<double>(value[i]) * units));
    const float scale = largest / (static_cast<float>(kActivationOne) * static_cast<float>(kLevelOne));
    std::memcpy(out + kStep, &scale, sizeof scale);
  }
}

// M activations, `x_stride` apart. kTwo: two groups in a step, one in each half of the lanes; otherwise a group is
// whole steps.
template <int M, bool kTwo>
void dot_products_of_row(const RowOfEachRun& rows, int64_t columns, int64_t group_size, const int16_t* x,
                         int64_t x_stride, int64_t stride, float* sums) {
  __m256 sum[M][kRuns] = {};
  for (int64_t start = 0, group = 0; start < columns; start += kStep, x += kStep + kScaleElements) {
    for (int run = 0; run < kRuns; ++run) {
      const float* scale = rows.scales[run] + group;
      __m256 w_scale = _mm256_set1_ps(scale[0]);
      if (kTwo) w_scale = _mm256_insertf128_ps(w_scale, _mm_set1_ps(scale[1]), 1);
      _mm_prefetch(rows.packed[run] + start / 2 + kPrefetchBytes, _MM_HINT_T0);
      const Levels levels = decode(rows.packed[run] + start / 2);
      for (int i = 0; i < M; ++i) {
        const int16_t* xi = x + i * x_stride;
        float x_scale;
        std::memcpy(&x_scale, xi + kStep, sizeof x_scale);
        // One scale after the other: the product of two small ones would be lost.
        const __m256 product = _mm256_mul_ps(products_of_a_step(levels, xi), _mm256_set1_ps(x_scale));
        sum[i][run] = _mm256_fmadd_ps(product, w_scale, sum[i][run]);
      }
    }
    if (kTwo) group += 2;
    if (!kTwo && (start + kStep) % group_size == 0) ++group;
  }
  for (int i = 0; i < M; ++i) store_four(sums + i * stride, avx2::totals(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
}

void dot_products(const RowRuns& runs, int64_t columns, int64_t group_size, const int16_t* x, int64_t m, int16_t*,
                  float* sums) {
  const int64_t x_stride = columns / kStep * (kStep + kScaleElements), stride = runs.rows * kRuns;
  with_constant<kMostActivations>(m, [&](auto constant) {
    const auto compute =
        group_size % kStep == 0 ? &dot_products_of_row<constant, false> : &dot_products_of_row<constant, true>;
    for (int64_t row = 0; row < runs.rows; ++row)
      compute(row_of_each_run(runs, row, columns, group_size), columns, group_size, x, x_stride, stride,
              sums + row * kRuns);
  });
}

// Whether integers of 14 bits hold these activations about as well as T does: they are units of the largest magnitude
// of their step, so no outlier may stand far above the others; nor may the unit or the sum of a step leave the range of
// float32. Compared in float64, where no product overflows.
template <typename T>
bool suit(const T* x, int64_t m, int64_t d, int64_t stride) {
  constexpr double kMostOverMean = std::is_same_v<T, Float16> ? 8 : 16;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t start = 0; start < d; start += kStep) {
      const int64_t count = d - start < kStep ? d - start : kStep;
      float largest = 0, sum = 0;
      for (int64_t column = start; column < start + count; ++column) {
        const float magnitude = std::fabs(nf4::to_float(x[i * stride + column]));
        largest = largest < magnitude ? magnitude : largest;
        sum += magnitude;
      }
      const bool no_outlier = static_cast<double>(largest) * static_cast<double>(count) <= kMostOverMean * sum;
      if (!(sum == 0 || (no_outlier && largest >= 0x1p-90f && sum < 0x1p127f))) return false;  // nor infinity, NaN
    }
  return true;
}

template <typename T>
constexpr Activations<T, int16_t> activations() {
  return {.pack = &pack<T>, .suit = &suit<T>};
}

bool takes(int64_t m, int64_t columns, int64_t group_size) {
  return m <= kMostActivations && columns % kStep == 0 && (group_size % kStep == 0 || group_size == kStep / 2);
}

}  // namespace
}  // namespace squish::cpu::avx2

namespace squish::cpu {

constinit const LinearKernels<int16_t> kAvx2Int16Linear = {
    .step = avx2::kStep,
    .step_elements = avx2::kStep + avx2::kScaleElements,
    .block = 1,
    .takes = &avx2::takes,
    .activations = {avx2::activations<BFloat16>(), avx2::activations<Float16>()},
    .dot_products = &avx2::dot_products,
};

}  // namespace squish::cpu
SQUISH_END_TARGET_REGION

#endif
