// A table that finds the nearest level with one look-up and one comparison, proved at compile time.
//
// [-1, 1] is cut into 32 buckets so narrow that none holds two boundaries. A quotient's bucket tells how many
// boundaries lie in lower buckets (`first`); the only one still open is the next in line, kBoundaries[first]. If it
// lies in a higher bucket, the comparison is false by itself. This is exact whatever the rounding in bucket_of, as
// long as bucket_of is monotone and computes boundaries and quotients alike, which one fused multiply-add does.
#pragma once

#include <array>
#include <cstdint>
#include <limits>

#include "csrc/nf4/codebook.h"

namespace squish::cpu {

inline constexpr int kBucketCount = 32;
inline constexpr float kBucketsPerUnit = kBucketCount / 2;  // bucket = trunc(quotient * 16 + 16), and 1.0 in the last

namespace detail {

// The product and sum are exact in double for every boundary; one rounding to float is then what an FMA does.
constexpr int bucket_of(float quotient) {
  const double exact = static_cast<double>(quotient) * kBucketsPerUnit + kBucketsPerUnit;
  const int bucket = static_cast<int>(static_cast<float>(exact));
  return bucket < kBucketCount ? bucket : kBucketCount - 1;
}

constexpr std::array<int32_t, kBucketCount> compute_first_candidates() {
  std::array<int32_t, kBucketCount> first{};
  for (int bucket = 0; bucket < kBucketCount; ++bucket)
    for (float boundary : nf4::kBoundaries) first[bucket] += bucket_of(boundary) < bucket ? 1 : 0;
  return first;
}

constexpr bool no_bucket_holds_two_boundaries() {
  for (int k = 0; k + 1 < nf4::kBoundaryCount; ++k)
    if (bucket_of(nf4::kBoundaries[k]) == bucket_of(nf4::kBoundaries[k + 1])) return false;
  return true;
}
static_assert(no_bucket_holds_two_boundaries());

constexpr std::array<float, nf4::kLevelCount> compute_next_boundary() {
  std::array<float, nf4::kLevelCount> next{};
  for (int k = 0; k < nf4::kBoundaryCount; ++k) next[k] = nf4::kBoundaries[k];
  next[nf4::kBoundaryCount] = std::numeric_limits<float>::infinity();
  return next;
}

}  // namespace detail

alignas(64) inline constexpr std::array<int32_t, kBucketCount> kFirstCandidate = detail::compute_first_candidates();
alignas(64) inline constexpr std::array<float, nf4::kLevelCount> kNextBoundary = detail::compute_next_boundary();

}  // namespace squish::cpu
