// One group, encoded and decoded in plain C++: the arithmetic that every CPU path and every CUDA kernel shares or must
// reproduce bit for bit. Host and device. Compiled with -ffp-contract=off, no fast-math, denormals on.
#pragma once

#include <cstdint>

#include "csrc/nf4/codebook.h"
#include "csrc/nf4/float_bits.h"

namespace squish::nf4 {

// The scale of a group whose largest magnitude has these bits. Comparing magnitudes as unsigned integers orders NaN
// above infinity above every number, so one maximum finds the absmax and the non-finite groups alike.
SQUISH_HOST_DEVICE inline float scale_of(uint32_t absmax_bits) {
  if (absmax_bits >= kInfinityBits) return quiet_nan();  // decodes to NaN: nobody mistakes it for weights
  return absmax_bits == 0 ? 1.0f : float_of(absmax_bits);
}

SQUISH_HOST_DEVICE inline uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

template <typename T>
SQUISH_HOST_DEVICE inline uint32_t absmax_bits(const T* w, int64_t count) {
  uint32_t absmax = 0;
  for (int64_t i = 0; i < count; ++i) absmax = larger(absmax, bits_of(to_float(w[i])) & kMagnitudeMask);
  return absmax;
}

// Index of the nearest level, the lower one on a tie. A NaN is above no boundary: index 0.
// `boundaries`: the 15 of the codebook; a parameter, so that device code can pass its own copy.
SQUISH_HOST_DEVICE inline uint32_t nearest_level(float quotient, const float* boundaries) {
  uint32_t index = 0;
  for (int k = 0; k < kBoundaryCount; ++k) index += quotient > boundaries[k] ? 1u : 0u;
  return index;
}

// Divides: a multiplication by the reciprocal rounds differently.
SQUISH_HOST_DEVICE inline uint32_t encode(float w, float scale, const float* boundaries) {
  return nearest_level(w / scale, boundaries);
}

// The float32 product, rounded once more where T is a 16-bit type. Processors disagree on the bits of a NaN that they
// produce, so there is one NaN.
template <typename T>
SQUISH_HOST_DEVICE inline T decode(uint32_t index, float scale, const float* levels) {
  const float product = levels[index] * scale;
  return from_float<T>(product == product ? product : quiet_nan());
}

// An even count of columns from an even column on, one byte for two: what the scalar path does with all of a group, and
// a vector path with what is left of it.
template <typename T>
SQUISH_HOST_DEVICE inline void encode_pairs(const T* w, int64_t count, float scale, const float* boundaries,
                                            uint8_t* packed) {
  for (int64_t column = 0; column < count; column += 2)
    packed[column / 2] = pack_indices(encode(to_float(w[column]), scale, boundaries),
                                      encode(to_float(w[column + 1]), scale, boundaries));
}

template <typename T>
SQUISH_HOST_DEVICE inline void decode_pairs(const uint8_t* packed, int64_t count, float scale, const float* levels,
                                            T* out) {
  for (int64_t column = 0; column < count; column += 2) {
    out[column] = decode<T>(even_index(packed[column / 2]), scale, levels);
    out[column + 1] = decode<T>(odd_index(packed[column / 2]), scale, levels);
  }
}

}  // namespace squish::nf4
