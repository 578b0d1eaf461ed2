// The index of a quotient by one look-up and one comparison. Quotients of [-1, 1] fall into 32 bins, so narrow that
// none holds two boundaries: the bin says how many boundaries lie below it, and which one, if any, lies in it.
#pragma once

#include "csrc/nf4/codebook.h"

namespace squish::cuda {

constexpr int kBins = 32;  // one for every lane of a warp, which keeps its entry of the table in a register
constexpr float kBinsPerUnit = 15.4f;
// Added to a small number, it leaves the nearest integer in the low bits of the sum, and 16 in front of it.
constexpr float kBinOffset = 12582912.0f + 16.0f;

// What the GPU computes as the low five bits of fmaf(quotient, kBinsPerUnit, kBinOffset): the product is exact in
// double, and both sums round it to the nearest integer, ties to even.
constexpr int bin_of(float quotient) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  return static_cast<int>(double{quotient} * double{kBinsPerUnit} + kRound - kRound) + 16;
}

struct Bins {
  float boundary[kBins];  // 2 where there is none: no quotient is above it
  uint32_t below[kBins];  // boundaries below the bin
};

constexpr Bins make_bins() {
  Bins bins{};
  for (int bin = 0; bin < kBins; ++bin) {
    bins.boundary[bin] = 2.0f;
    for (float boundary : nf4::kBoundaries) {
      if (bin_of(boundary) < bin) ++bins.below[bin];
      if (bin_of(boundary) == bin) bins.boundary[bin] = boundary;
    }
  }
  return bins;
}
inline constexpr Bins kBinTable = make_bins();

// A correctly rounded sum is monotone, so a larger quotient never has a smaller bin. A quotient is therefore above
// every boundary of a smaller bin and above none of a larger one, and the table is right if no bin holds two.
constexpr bool no_bin_holds_two() {
  for (int k = 1; k < nf4::kBoundaryCount; ++k)
    if (bin_of(nf4::kBoundaries[k - 1]) >= bin_of(nf4::kBoundaries[k])) return false;
  return bin_of(-1.0f) > 0 && bin_of(1.0f) < kBins;
}
static_assert(no_bin_holds_two());

}  // namespace squish::cuda
