// The plain path: runs anywhere, and is what the other paths must equal bit for bit.
#include "csrc/cpu/group_loops.h"
#include "csrc/cpu/kernels.h"
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
};

// Eight lanes in plain C++: one running float32 sum over thousands of columns would lose digits.
struct ScalarFloats {
  using Element = float;
  static constexpr int64_t kLanes = 8;
  static constexpr auto decode_columns = &cpu::decode_columns<ScalarPath, Stores::kCached, float>;
  static constexpr int kBlock = 2, kFew = 1;
  struct Operand {
    float lane[kLanes];
  };
  using Sum = Operand;
  static constexpr int64_t kMostGroups = kLanes;
  struct OneGroup {
    float level[nf4::kLevelCount];
    OneGroup() = default;
    explicit OneGroup(float scale) {
      for (int k = 0; k < nf4::kLevelCount; ++k) level[k] = nf4::kCodebook.level[k] * scale;
    }
  };
  struct SomeGroups {
    float scale[kLanes];  // of each lane's two columns
    SomeGroups() = default;
    SomeGroups(const float* scales, int shift) {
      for (int64_t lane = 0; lane < kLanes; ++lane) scale[lane] = scales[lane >> shift];
    }
  };

  static Sum zero() { return {}; }
  static void look_up(const uint8_t* packed, const float* level, Operand& even, Operand& odd) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      even.lane[lane] = level[nf4::even_index(packed[lane])];
      odd.lane[lane] = level[nf4::odd_index(packed[lane])];
    }
  }
  static void decode(const uint8_t* packed, const OneGroup& levels, Operand& even, Operand& odd) {
    look_up(packed, levels.level, even, odd);
  }
  static void decode(const uint8_t* packed, const SomeGroups& levels, Operand& even, Operand& odd) {
    look_up(packed, nf4::kCodebook.level, even, odd);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      even.lane[lane] *= levels.scale[lane];
      odd.lane[lane] *= levels.scale[lane];
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

constinit const Kernels kScalarKernels = kernels_of_path<ScalarPath>(linear_kernels_of<ScalarFloats>());

}  // namespace squish::cpu
