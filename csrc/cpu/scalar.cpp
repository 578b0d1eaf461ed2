// The plain path: runs anywhere. What it encodes and decodes the other paths must equal bit for bit; their products may
// be summed in another order.
#include <cmath>

#include "csrc/cpu/codec_loops.h"
#include "csrc/cpu/linear_loops.h"

namespace squish::cpu {
namespace {

struct ScalarPath {
  template <typename T>
  static uint32_t absmax_bits(const T* w, int64_t count) {
    return nf4::absmax_bits(w, count);
  }

  template <typename T>
  static void encode_pairs(const T* w, int64_t count, float scale, uint8_t* packed) {
    nf4::encode_pairs(w, count, scale, nf4::kCodebook.boundary, packed);
  }

  // Plain C++ has no stores past the caches: both forms are one.
  template <Stores, typename T>
  static void decode_pairs(const uint8_t* packed, int64_t count, float scale, T* out) {
    nf4::decode_pairs(packed, count, scale, nf4::kCodebook.level, out);
  }
  static void fence() {}

  struct Survey {
    double sum[kSurveyLanes] = {}, square[kSurveyLanes] = {}, error[kSurveyLanes] = {};
    template <typename T>
    void add(const T* w, const float* decoded) {
      for (int64_t lane = 0; lane < kSurveyLanes; ++lane) {
        const float exact = nf4::to_float(w[lane]);
        const auto value = static_cast<double>(exact), difference = static_cast<double>(exact - decoded[lane]);
        sum[lane] += std::fabs(value);
        square[lane] += value * value;
        error[lane] += difference * difference;
      }
    }
    void store(double* sums, double* squares, double* errors) const {
      std::copy_n(sum, kSurveyLanes, sums);
      std::copy_n(square, kSurveyLanes, squares);
      std::copy_n(error, kSurveyLanes, errors);
    }
  };
};

// Eight lanes in plain C++: one running float32 sum over thousands of columns would lose digits.
struct ScalarFloats {
  using Element = float;
  static constexpr int64_t kLanes = 8;
  static constexpr int kBlock = 2, kFew = 1;
  struct Operand {
    float lane[kLanes];
  };
  using Sum = Operand;
  struct OneGroup {
    float level[nf4::kLevelCount];
    OneGroup() = default;
    explicit OneGroup(float scale) {
      for (int k = 0; k < nf4::kLevelCount; ++k) level[k] = nf4::kCodebook.level[k] * scale;
    }
  };
  struct TwoGroups {
    OneGroup half[2];
    TwoGroups(float a, float b) : half{OneGroup(a), OneGroup(b)} {}
  };
  struct Lanes {
    int64_t even[kLanes], odd[kLanes];  // the groups of a lane's two columns, counted from the cursor's
    int64_t bytes;                      // of a row, for these lanes
    explicit Lanes(GroupCursor cursor) : bytes(std::min<int64_t>((cursor.columns - cursor.column) / 2, kLanes)) {
      const int64_t first = cursor.group;
      for (int64_t lane = 0; lane < bytes; ++lane) {
        even[lane] = cursor.group - first;
        advance(cursor, 1);
        odd[lane] = cursor.group - first;
        advance(cursor, 1);
      }
    }
  };
  struct LaneScales {
    const float* scales;
    const Lanes& lanes;
    LaneScales(const float* from, const Lanes& groups) : scales(from), lanes(groups) {}
  };

  static Sum zero() { return {}; }
  static void decode(const uint8_t* packed, const OneGroup& levels, Operand& even, Operand& odd) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      even.lane[lane] = levels.level[nf4::even_index(packed[lane])];
      odd.lane[lane] = levels.level[nf4::odd_index(packed[lane])];
    }
  }
  static void decode(const uint8_t* packed, const TwoGroups& levels, Operand& even, Operand& odd) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float* level = levels.half[lane / (kLanes / 2)].level;
      even.lane[lane] = level[nf4::even_index(packed[lane])];
      odd.lane[lane] = level[nf4::odd_index(packed[lane])];
    }
  }
  static void decode(const uint8_t* packed, const LaneScales& scales, Operand& even, Operand& odd) {
    const Lanes& lanes = scales.lanes;
    even = odd = {};
    for (int64_t lane = 0; lane < lanes.bytes; ++lane) {
      even.lane[lane] = nf4::kCodebook.level[nf4::even_index(packed[lane])] * scales.scales[lanes.even[lane]];
      odd.lane[lane] = nf4::kCodebook.level[nf4::odd_index(packed[lane])] * scales.scales[lanes.odd[lane]];
    }
  }
  static Operand load(const float* x) {
    Operand loaded;
    for (int64_t lane = 0; lane < kLanes; ++lane) loaded.lane[lane] = x[lane];
    return loaded;
  }
  static void store(float* to, const Operand& x) {
    for (int64_t lane = 0; lane < kLanes; ++lane) to[lane] = x.lane[lane];
  }
  static Sum multiply_add(const Operand& a, const Operand& b, Sum sum) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sum.lane[lane] += a.lane[lane] * b.lane[lane];
    return sum;
  }
  static float total(const Sum& sum) {
    const float* s = sum.lane;
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
  }
  static Four totals(const Sum& a, const Sum& b, const Sum& c, const Sum& d) {
    return Four{total(a), total(b), total(c), total(d)};
  }
};

}  // namespace

constinit const Codecs kScalarCodecs = codecs_of<ScalarPath>();
constinit const LinearKernels<float> kScalarLinear = linear_kernels_of<ScalarFloats, float, BFloat16, Float16>();

}  // namespace squish::cpu
