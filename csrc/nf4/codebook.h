// The NF4 format in numbers: the one table of levels, the boundaries between them, and the nibble order.
// Levels: QLoRA (Dettmers et al., arXiv 2305.14314), appendix E. C++20, host and device, no dependencies.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#if defined(__CUDACC__)
#define SQUISH_HOST_DEVICE __host__ __device__
#else
#define SQUISH_HOST_DEVICE
#endif

namespace squish::nf4 {

inline constexpr int kLevelCount = 16;
inline constexpr int kBoundaryCount = kLevelCount - 1;

inline constexpr std::array<float, kLevelCount> kLevels = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};
inline constexpr int kZeroLevel = 7;  // the index that decodes to 0.0, and so the one that padding holds

// Byte j of a row holds columns 2j and 2j+1.
inline constexpr int kEvenColumnShift = 0;
inline constexpr int kOddColumnShift = 4;
inline constexpr uint32_t kNibbleMask = 15;

SQUISH_HOST_DEVICE constexpr uint8_t pack_indices(uint32_t even_column, uint32_t odd_column) {
  return static_cast<uint8_t>(even_column << kEvenColumnShift | odd_column << kOddColumnShift);
}
SQUISH_HOST_DEVICE constexpr uint32_t even_index(uint8_t byte) { return byte >> kEvenColumnShift & kNibbleMask; }
SQUISH_HOST_DEVICE constexpr uint32_t odd_index(uint8_t byte) { return byte >> kOddColumnShift & kNibbleMask; }

namespace detail {

// The float below a finite, nonzero one.
constexpr float next_below(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return std::bit_cast<float>(x > 0 ? bits - 1 : bits + 1);
}

// The largest float that is not nearer to `above` than to `below`. A tie goes to the lower level, so it is the exact
// midpoint rounded towards minus infinity. Rounded to nearest it would be one ulp too high for six of the fifteen.
constexpr float boundary_between(float below, float above) {
  const double midpoint = (static_cast<double>(below) + static_cast<double>(above)) / 2;
  const float rounded = static_cast<float>(midpoint);
  return static_cast<double>(rounded) > midpoint ? next_below(rounded) : rounded;
}

constexpr std::array<float, kBoundaryCount> compute_boundaries() {
  std::array<float, kBoundaryCount> boundaries{};
  for (int k = 0; k < kBoundaryCount; ++k) boundaries[k] = boundary_between(kLevels[k], kLevels[k + 1]);
  return boundaries;
}

// What the arithmetic above relies on: the levels ascend, span [-1, 1] around an exact zero, and every midpoint is
// exact in double, so that rounding it happens once.
constexpr bool table_is_sound() {
  for (int k = 0; k < kBoundaryCount; ++k) {
    const double below = kLevels[k], above = kLevels[k + 1], sum = below + above;
    if (!(below < above) || sum - below != above || sum - above != below) return false;
  }
  return kLevels.front() == -1.0f && kLevels.back() == 1.0f && kLevels[kZeroLevel] == 0.0f;
}
static_assert(table_is_sound());

}  // namespace detail

// A quotient belongs to the level whose index is the number of boundaries below it (quotient > boundary).
inline constexpr std::array<float, kBoundaryCount> kBoundaries = detail::compute_boundaries();

// Both tables in plain arrays, for device code, which cannot index a std::array that lives on the host.
struct Codebook {
  float level[kLevelCount];
  float boundary[kBoundaryCount];
};

namespace detail {
constexpr Codebook make_codebook() {
  Codebook book{};
  for (int k = 0; k < kLevelCount; ++k) book.level[k] = kLevels[k];
  for (int k = 0; k < kBoundaryCount; ++k) book.boundary[k] = kBoundaries[k];
  return book;
}
}  // namespace detail

inline constexpr Codebook kCodebook = detail::make_codebook();

}  // namespace squish::nf4
