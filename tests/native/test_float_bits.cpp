// csrc/nf4/float_bits.h: every 16-bit value, and every place where the rounding to 16 bits decides.
#include "csrc/nf4/float_bits.h"

#include <cmath>
#include <type_traits>

#include "tests/native/support.h"

namespace test {
namespace {

using namespace squish::nf4;

// What a 16-bit pattern means, from the definition of the format: `fraction_bits` of fraction, the exponent above them.
float meaning(uint16_t bits, int fraction_bits, int bias) {
  const int exponent_mask = (1 << (15 - fraction_bits)) - 1;
  const int exponent = bits >> fraction_bits & exponent_mask, fraction = bits & ((1 << fraction_bits) - 1);
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == exponent_mask) return fraction ? NAN : sign * INFINITY;
  const int significand = exponent == 0 ? fraction : fraction | 1 << fraction_bits;
  const int power = (exponent == 0 ? 1 : exponent) - bias - fraction_bits;
  return sign * static_cast<float>(std::ldexp(static_cast<double>(significand), power));
}

// The compiler's own type of the same format, where it has one.
#if defined(__aarch64__)
#define SQUISH_TEST_HALF __fp16
#elif defined(__FLT16_MAX__)
#define SQUISH_TEST_HALF _Float16
#endif

#if defined(SQUISH_TEST_HALF)
void compare_with_compiler(float x) {
  const auto compilers = static_cast<SQUISH_TEST_HALF>(x);
  uint16_t expected;
  std::memcpy(&expected, &compilers, sizeof expected);
  CHECK(to_float16(x).bits == expected, "%a -> %04x, the compiler says %04x", x, to_float16(x).bits, expected);
}
#else
void compare_with_compiler(float) {}
#endif
void compare_with_compiler(BFloat16) {}
void compare_with_compiler(Float16 half) {
  compare_with_compiler(to_float(half));
#if defined(SQUISH_TEST_HALF)
  SQUISH_TEST_HALF compilers;
  std::memcpy(&compilers, &half.bits, sizeof compilers);
  const float expected = static_cast<float>(compilers), found = to_float(half);
  CHECK(bits_of(found) == bits_of(expected), "%04x -> %a, the compiler says %a", half.bits, found, expected);
#endif
}

template <typename Half>
void expect_rounds_to(float x, uint16_t expected) {
  CHECK(from_float<Half>(x).bits == expected, "%a -> %04x, not %04x", x, from_float<Half>(x).bits, expected);
  CHECK(from_float<Half>(-x).bits == (expected | 0x8000), "%a -> %04x", -x, from_float<Half>(-x).bits);
  if (std::is_same_v<Half, Float16>) compare_with_compiler(x);
}

template <typename Half>
void check_type(int fraction_bits, int bias, uint16_t infinity) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const Half half{static_cast<uint16_t>(bits)};
    const float value = to_float(half), expected = meaning(half.bits, fraction_bits, bias);
    if ((bits & 0x7fff) > infinity) {
      CHECK(std::isnan(value), "%04x -> %a", bits, value);
      const auto quiet = static_cast<uint32_t>((bits & 0x8000) | infinity | 1 << (fraction_bits - 1));
      CHECK(from_float<Half>(value).bits == quiet, "NaN %04x -> %04x", bits, from_float<Half>(value).bits);
      continue;
    }
    CHECK(bits_of(value) == bits_of(expected), "%04x -> %a, not %a", bits, value, expected);
    CHECK(from_float<Half>(value).bits == bits, "%04x comes back as %04x", bits, from_float<Half>(value).bits);
    compare_with_compiler(half);
  }
  // Between two neighbours the result changes at the midpoint only, and there it is the even one. The neighbour of the
  // largest number is what it would be with one more exponent; it is infinity.
  const double past_largest = std::ldexp(2.0, (1 << (15 - fraction_bits)) - 2 - bias);
  for (uint16_t low = 0; low < infinity; ++low) {
    const auto high = static_cast<uint16_t>(low + 1);
    const double above = high == infinity ? past_largest : meaning(high, fraction_bits, bias);
    const auto midpoint = static_cast<float>((meaning(low, fraction_bits, bias) + above) / 2);
    expect_rounds_to<Half>(std::nextafter(midpoint, 0.0f), low);
    expect_rounds_to<Half>(midpoint, low % 2 == 0 ? low : high);
    expect_rounds_to<Half>(std::nextafter(midpoint, INFINITY), high);
  }
  expect_rounds_to<Half>(INFINITY, infinity);
  for (uint32_t nan : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffffffffu}) {
    const uint32_t quiet = (nan >> 16 & 0x8000) | infinity | 1u << (fraction_bits - 1);
    CHECK(from_float<Half>(float_of(nan)).bits == quiet, "%08x -> %04x", nan, from_float<Half>(float_of(nan)).bits);
  }
}

}  // namespace

void check_float_bits() {
  check_type<Float16>(10, 15, 0x7c00);
  check_type<BFloat16>(7, 127, 0x7f80);
}

}  // namespace test
