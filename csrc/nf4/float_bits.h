// Conversions between float32 and the 16-bit types as integer arithmetic: the same bits on every compiler, CPU and GPU,
// whatever the rounding and flush-to-zero modes. Host and device, no dependencies.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "csrc/nf4/codebook.h"

namespace squish::nf4 {

// 16-bit storage types. Distinct types, so that a kernel is chosen by overload and not by a flag.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline constexpr uint32_t kMagnitudeMask = 0x7fffffff;
inline constexpr uint32_t kInfinityBits = 0x7f800000;
inline constexpr uint32_t kQuietNanBits = 0x7fc00000;

SQUISH_HOST_DEVICE inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
SQUISH_HOST_DEVICE inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }
SQUISH_HOST_DEVICE inline float quiet_nan() { return float_of(kQuietNanBits); }

SQUISH_HOST_DEVICE inline float to_float(float x) { return x; }
SQUISH_HOST_DEVICE inline float to_float(double x) { return static_cast<float>(x); }
SQUISH_HOST_DEVICE inline float to_float(BFloat16 x) { return float_of(uint32_t{x.bits} << 16); }

SQUISH_HOST_DEVICE inline float to_float(Float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t exponent = x.bits >> 10 & 31u, fraction = x.bits & 1023u;
  if (exponent == 31) return float_of(sign | kInfinityBits | fraction << 13 | (fraction ? 0x400000u : 0u));
  if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
  if (fraction == 0) return float_of(sign);
  // Subnormal: fraction * 2^-24. Shift the leading one to the implicit place.
  uint32_t shift = 0;
  while (!(fraction << shift & 1024u)) ++shift;
  return float_of(sign | (113 - shift) << 23 | (fraction << shift & 1023u) << 13);
}

// Round to nearest even; a NaN becomes the quiet NaN of its sign.
SQUISH_HOST_DEVICE inline BFloat16 to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & kMagnitudeMask) > kInfinityBits) return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | 0x7fc0u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

SQUISH_HOST_DEVICE inline Float16 to_float16(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & kMagnitudeMask;
  const uint32_t sign = bits >> 16 & 0x8000u;
  if (magnitude > kInfinityBits) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (magnitude < 0x33000001u) return {static_cast<uint16_t>(sign)};             // 2^-25 and below round to zero
  if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, kept in the last `shift` bits of the significand
    const uint32_t shift = 126 - (magnitude >> 23);
    const uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
    const uint32_t kept = significand >> shift, rest = significand & ((1u << shift) - 1), half = 1u << (shift - 1);
    return {static_cast<uint16_t>(sign | (kept + (rest > half || (rest == half && (kept & 1u)) ? 1u : 0u)))};
  }
  const uint32_t rebased = magnitude - (112u << 23);
  return {static_cast<uint16_t>(sign | (rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13)};
}

template <typename T>
SQUISH_HOST_DEVICE inline T from_float(float x);
template <>
SQUISH_HOST_DEVICE inline float from_float<float>(float x) {
  return x;
}
template <>
SQUISH_HOST_DEVICE inline BFloat16 from_float<BFloat16>(float x) {
  return to_bfloat16(x);
}
template <>
SQUISH_HOST_DEVICE inline Float16 from_float<Float16>(float x) {
  return to_float16(x);
}

// From one type to another; float32 in between holds each of them exactly.
template <typename To, typename From>
SQUISH_HOST_DEVICE inline To convert(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else {
    return from_float<To>(to_float(x));
  }
}

}  // namespace squish::nf4
