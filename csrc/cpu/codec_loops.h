// The walk over groups that all CPU paths share. A path is a type `Path` in an anonymous namespace with
//   absmax_bits(const T* w, count)                        the largest magnitude, as bits
//   encode_pairs(const T* w, count, scale, packed)        an even count of columns, from an even column on
//   decode_pairs<Stores>(packed, count, scale, T* out)    likewise
//   fence()                                               after stores past the caches
//   Survey                                                running sums, with
//     add(const T* w, const float* decoded)               kSurveyLanes columns
//     store(double* sum, double* square, double* error)   of each lane
// This header is included inside a path's target region: the loops are then compiled for that path, and being
// templates over a local type, they stay in its object file.
#pragma once

#include "csrc/cpu/target_region.h"

namespace squish::cpu {

// If group_size is odd, every second group starts at an odd column: its first column shares a byte with the last
// column of the group before it. These two columns are taken one by one, the even stretch between them by the path.
template <class Path, typename T>
void encode_groups(const T* w, int64_t columns, int64_t group_size, uint8_t* packed, float* scales) {
  const float* boundaries = nf4::kCodebook.boundary;
  for (int64_t group = 0, column = 0; column < columns; ++group) {
    const float scale = nf4::scale_of(Path::absmax_bits(w + column, group_size));
    const int64_t end = column + group_size;
    scales[group] = scale;
    if (column % 2 != 0) {
      packed[column / 2] |= nf4::pack_indices(0, nf4::encode(nf4::to_float(w[column]), scale, boundaries));
      ++column;
    }
    const int64_t even_count = (end - column) & ~int64_t{1};
    Path::encode_pairs(w + column, even_count, scale, packed + column / 2);
    column += even_count;
    if (column < end) {
      packed[column / 2] = nf4::pack_indices(nf4::encode(nf4::to_float(w[column]), scale, boundaries), 0);
      column = end;
    }
  }
}

// Bytes that are fetched ahead of stores past the caches, which leave a processor too busy to do so itself.
inline constexpr int64_t kDecodePrefetchBytes = 1024;

template <class Path, Stores kStores, typename T>
void decode_columns(const uint8_t* packed, const float* scales, int64_t first, int64_t last, int64_t group_size,
                    T* out) {
  constexpr bool kPastCaches = kStores == Stores::kPastCaches;
  const float* levels = nf4::kCodebook.level;
  out -= first;
  for (int64_t group = first / group_size, column = first; column < last; ++group) {
    const float scale = scales[group];
    const int64_t end = std::min(last, (group + 1) * group_size);
    if (column % 2 != 0) {
      out[column] = nf4::decode<T>(nf4::odd_index(packed[column / 2]), scale, levels);
      ++column;
    }
    const int64_t even_count = (end - column) & ~int64_t{1};
    if constexpr (kPastCaches) __builtin_prefetch(packed + column / 2 + kDecodePrefetchBytes);
    Path::template decode_pairs<kStores>(packed + column / 2, even_count, scale, out + column);
    column += even_count;
    if (column < end) {
      out[column] = nf4::decode<T>(nf4::even_index(packed[column / 2]), scale, levels);
      column = end;
    }
  }
  if constexpr (kPastCaches) Path::fence();
}

template <class Path, typename T>
RowSurvey survey_row(const T* w, int64_t d, const uint8_t* packed, const float* scales, int64_t group_size) {
  constexpr int64_t kPart = 512;  // columns that are decoded at once, into the nearest cache
  alignas(64) float decoded[kPart];
  typename Path::Survey survey;
  uint32_t largest = 0;
  for (int64_t first = 0; first < d; first += kPart) {
    const int64_t count = std::min(kPart, d - first), even_count = count + count % 2;
    decode_columns<Path, Stores::kCached>(packed, scales, first, first + even_count, group_size, decoded);
    largest = nf4::larger(largest, Path::absmax_bits(w + first, count));
    int64_t i = 0;
    for (; i + kSurveyLanes <= count; i += kSurveyLanes) survey.add(w + first + i, decoded + i);
    if (i == count) continue;
    float last[kSurveyLanes] = {}, last_decoded[kSurveyLanes] = {};
    for (int64_t lane = 0; i < count; ++i, ++lane) {
      last[lane] = nf4::to_float(w[first + i]);
      last_decoded[lane] = decoded[i];
    }
    survey.add(last, last_decoded);
  }
  double lanes[3][kSurveyLanes];
  survey.store(lanes[0], lanes[1], lanes[2]);
  RowSurvey found{static_cast<double>(nf4::float_of(largest)), 0, 0, 0};
  for (int64_t lane = 0; lane < kSurveyLanes; ++lane) {
    found.sum += lanes[0][lane];
    found.square += lanes[1][lane];
    found.squared_error += lanes[2][lane];
  }
  return found;
}

template <class Path, typename T>
constexpr Codec<T> codec_of() {
  return {.encode = &encode_groups<Path, T>,
          .decode = &decode_columns<Path, Stores::kCached, T>,
          .decode_past_caches = &decode_columns<Path, Stores::kPastCaches, T>,
          .survey = &survey_row<Path, T>};
}

template <class Path>
constexpr Codecs codecs_of() {
  return {codec_of<Path, float>(), codec_of<Path, BFloat16>(), codec_of<Path, Float16>(),
          Codec<double>{.encode = &encode_groups<Path, double>, .survey = &survey_row<Path, double>}};
}

}  // namespace squish::cpu
