// Every path against a column-by-column walk with csrc/nf4/codec.h: all types, odd sizes, buffers that no byte can
// leave.
#include <cfenv>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "csrc/cpu/float_environment.h"
#include "csrc/nf4/codec.h"
#include "tests/native/support.h"

namespace test {
namespace {

using namespace squish;
using nf4::BFloat16;
using nf4::Float16;

constexpr int64_t kGroupSizes[] = {1,  2,  3,  4,  5,  7,  8,  14, 15, 16,  17, 30,
                                   31, 32, 33, 34, 48, 63, 64, 66, 96, 100, 130};

template <typename T>
T value_of(float x) {
  if constexpr (std::is_same_v<T, double>)
    return static_cast<double>(x) * (1 + 0x1p-30);  // not a float32
  else
    return nf4::from_float<T>(x);
}

// Groups of every kind: ordinary, zero, subnormal, huge, and with NaN or infinity.
template <typename T>
std::vector<T> weights(Random& random, int64_t columns, int64_t group_size) {
  std::vector<T> w(static_cast<size_t>(columns));
  for (int64_t group = 0; group < columns / group_size; ++group) {
    const uint32_t kind = random.bits() % 8;
    const float size = kind == 1 ? 0.0f : kind == 2 ? 0x1p-130f : kind == 3 ? 0x1p127f : 1.0f;
    T* from = w.data() + group * group_size;
    for (int64_t i = 0; i < group_size; ++i) from[i] = value_of<T>(size * random.between_minus_one_and_one());
    if (kind == 4) from[random.bits() % group_size] = value_of<T>(std::numeric_limits<float>::quiet_NaN());
    if (kind == 5) from[random.bits() % group_size] = value_of<T>(-std::numeric_limits<float>::infinity());
  }
  return w;
}

template <typename T>
void check_encode(const Path& path, Random& random, int64_t columns, int64_t group_size) {
  const std::vector<T> values = weights<T>(random, columns, group_size);
  std::vector<float> scales(static_cast<size_t>(columns / group_size));
  std::vector<uint32_t> indices(values.size());
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t group = i / group_size;
    scales[group] = nf4::scale_of(nf4::absmax_bits(values.data() + group * group_size, group_size));
    indices[i] = nf4::encode(nf4::to_float(values[i]), scales[group], nf4::kCodebook.boundary);
  }
  for (Place place : kPlaces) {
    Buffer<T> w(values, place);
    Buffer<uint8_t> packed(columns / 2, place);
    Buffer<float> found(columns / group_size, place);
    path.codec<T>().encode(w.data(), columns, group_size, packed.data(), found.data());
    for (int64_t i = 0; i < columns; ++i) {
      const uint32_t index = i % 2 == 0 ? nf4::even_index(packed[i / 2]) : nf4::odd_index(packed[i / 2]);
      CHECK(index == indices[i], "%s, group_size %d, column %d of %d: index %u, not %u", path.name, int(group_size),
            int(i), int(columns), index, indices[i]);
    }
    for (int64_t g = 0; g < columns / group_size; ++g)
      CHECK(nf4::bits_of(found[g]) == nf4::bits_of(scales[g]), "%s, group_size %d: scale %a, not %a", path.name,
            int(group_size), found[g], scales[g]);
  }
}

template <typename T>
void check_decode(const Path& path, const std::vector<uint8_t>& bytes, const std::vector<float>& scales, int64_t first,
                  int64_t last, int64_t group_size, Place place, cpu::Stores stores) {
  Buffer<uint8_t> packed(bytes, place);
  Buffer<float> scale(scales, place);
  Buffer<T> out(last - first, place);
  const auto& codec = path.codec<T>();
  const auto decode = stores == cpu::Stores::kPastCaches ? codec.decode_past_caches : codec.decode;
  decode(packed.data(), scale.data(), first, last, group_size, out.data());
  for (int64_t i = first; i < last; ++i) {
    const uint32_t index = i % 2 == 0 ? nf4::even_index(bytes[i / 2]) : nf4::odd_index(bytes[i / 2]);
    const T expected = nf4::decode<T>(index, scales[i / group_size], nf4::kCodebook.level);
    CHECK(std::memcmp(&out[i - first], &expected, sizeof(T)) == 0,
          "%s, group_size %d, column %d of %d to %d: %a, not %a", path.name, int(group_size), int(i), int(first),
          int(last), nf4::to_float(out[i - first]), nf4::to_float(expected));
  }
}

template <typename T>
void check_decode(const Path& path, Random& random, int64_t columns, int64_t group_size) {
  constexpr float kSpecial[] = {-0.75f, 0x1p-140f, 3e38f, NAN, INFINITY, -INFINITY, 0.0f, 65504.0f};
  std::vector<uint8_t> bytes(static_cast<size_t>(columns / 2));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.bits());
  std::vector<float> scales(static_cast<size_t>(columns / group_size));
  for (float& scale : scales)
    scale = random.bits() % 3 == 0 ? kSpecial[random.bits() % std::size(kSpecial)] : random.between_minus_one_and_one();
  // All columns, and a part that begins and ends inside a group.
  const int64_t pairs = columns / 2, middle = pairs == 0 ? 0 : random.bits() % pairs * 2;
  const int64_t after = middle + (columns == middle ? 0 : random.bits() % ((columns - middle) / 2 + 1) * 2);
  for (const auto& [first, last] : {std::pair(int64_t{0}, columns), std::pair(middle, after)})
    for (Place place : kPlaces)
      check_decode<T>(path, bytes, scales, first, last, group_size, place, cpu::Stores::kCached);
  if (group_size % cpu::kPastCachesColumns != 0) return;
  for (Place on_64_bytes : {Place::kBeforeGuard, Place::kAfterGuard})
    check_decode<T>(path, bytes, scales, 0, columns, group_size, on_64_bytes, cpu::Stores::kPastCaches);
}
// To the bit what the scalar path says, of a row as wide as what is packed or padded by a column, and nothing is read
// beyond either.
template <typename T>
void check_survey(const Path& path, Random& random, int64_t columns, int64_t group_size) {
  std::vector<uint8_t> bytes(static_cast<size_t>(columns / 2));
  std::vector<float> scales(static_cast<size_t>(columns / group_size));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.bits());
  for (float& scale : scales) scale = random.between_minus_one_and_one();
  for (int64_t d = columns; d >= 0 && d >= columns - 1; --d) {
    std::vector<T> w;
    for (int64_t i = 0; i < d; ++i) w.push_back(value_of<T>(random.between_minus_one_and_one()));
    const auto survey_of_scalar = cpu::paths().front().codec<T>().survey;
    const cpu::RowSurvey expected = survey_of_scalar(w.data(), d, bytes.data(), scales.data(), group_size);
    for (Place place : kPlaces) {
      Buffer<T> from(w, place);
      Buffer<uint8_t> packed(bytes, place);
      Buffer<float> scale(scales, place);
      const cpu::RowSurvey found = path.codec<T>().survey(from.data(), d, packed.data(), scale.data(), group_size);
      CHECK(std::memcmp(&found, &expected, sizeof found) == 0, "%s, group_size %d, %d of %d columns", path.name,
            int(group_size), int(d), int(columns));
    }
  }
}

void encode_under(const Path& path, const std::vector<float>& w, uint8_t* packed, float* scale) {
  const cpu::DefaultFloatEnvironment environment;
  path.codec<float>().encode(w.data(), static_cast<int64_t>(w.size()), static_cast<int64_t>(w.size()), packed, scale);
}

}  // namespace

void check_encode_and_decode() {
  CHECK(nf4::scale_of(0) == 1.0f && nf4::scale_of(1) == 0x1p-149f, "the scale of zeros, and the smallest");
  CHECK(nf4::bits_of(nf4::scale_of(nf4::kInfinityBits - 1)) == nf4::kInfinityBits - 1, "the largest scale");
  for (uint32_t absmax : {0x7f800000u, 0x7f800001u, 0x7fffffffu})
    CHECK(nf4::bits_of(nf4::scale_of(absmax)) == 0x7fc00000u, "the scale of a group with %08x", absmax);
  Random random;
  for (const Path& path : available_paths())
    for (int64_t group_size : kGroupSizes)
      for (int64_t blocks : {0, 1, 2, 5}) {
        const int64_t columns = blocks * std::lcm(int64_t{2}, group_size);
        check_encode<float>(path, random, columns, group_size);
        check_encode<double>(path, random, columns, group_size);
        check_encode<BFloat16>(path, random, columns, group_size);
        check_encode<Float16>(path, random, columns, group_size);
        check_decode<float>(path, random, columns, group_size);
        check_decode<BFloat16>(path, random, columns, group_size);
        check_decode<Float16>(path, random, columns, group_size);
        check_survey<float>(path, random, columns, group_size);
        check_survey<double>(path, random, columns, group_size);
        check_survey<BFloat16>(path, random, columns, group_size);
        check_survey<Float16>(path, random, columns, group_size);
      }
}

// Whatever rounding the thread had asked for, the scope computes as by default and gives the caller's mode back.
void check_float_environment() {
  Random random;
  std::vector<float> w(66);
  for (float& value : w) value = 0x1p-140f * random.between_minus_one_and_one();
  for (const Path& path : available_paths()) {
    uint8_t expected[33], found[33];
    float expected_scale, found_scale;
    encode_under(path, w, expected, &expected_scale);
    for (int mode : {FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO}) {
      CHECK(std::fesetround(mode) == 0, "no rounding mode");
      encode_under(path, w, found, &found_scale);
      CHECK(std::fegetround() == mode, "%s leaves another rounding mode behind", path.name);
      std::fesetround(FE_TONEAREST);
      CHECK(std::memcmp(found, expected, sizeof found) == 0 && found_scale == expected_scale, "%s", path.name);
    }
  }
}

}  // namespace test
