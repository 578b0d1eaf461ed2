// The plain path: runs anywhere, and is what the other paths must equal bit for bit.
#include "csrc/cpu/group_loops.h"
#include "csrc/cpu/kernels.h"

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

  template <typename T>
  static void decode_pairs(const uint8_t* packed, int64_t count, float scale, T* out) {
    nf4::decode_pairs(packed, count, scale, nf4::kCodebook.level, out);
  }

  // Eight partial sums: one running float32 sum over thousands of columns would lose digits.
  template <int M>
  static void linear_row(const uint8_t* packed, const float* scales, int64_t count, int64_t group_size, const float* x,
                         float* result) {
    constexpr int kPartials = 8;
    const int64_t half_group = group_size / 2;
    float sums[M][kPartials] = {};
    for (int64_t j = 0; j < count / 2; ++j) {
      const float scale = scales[j / half_group];
      const float even = nf4::decode<float>(nf4::even_index(packed[j]), scale, nf4::kCodebook.level);
      const float odd = nf4::decode<float>(nf4::odd_index(packed[j]), scale, nf4::kCodebook.level);
      for (int i = 0; i < M; ++i) {
        const float* xi = x + i * count + j;
        sums[i][j % kPartials] += even * xi[0] + odd * xi[count / 2];
      }
    }
    for (int i = 0; i < M; ++i) {
      const float* s = sums[i];
      result[i] = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
    }
  }
};

}  // namespace

constinit const Kernels kScalarKernels = kernels_of_path<ScalarPath>();

}  // namespace squish::cpu
