// The C interface: checks, and a call of the kernels. Exceptions cannot leave: nothing here throws.
#include "csrc/c/squish_nf4.h"

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>

#include "csrc/cpu/dispatch.h"
#include "csrc/cpu/float_environment.h"
#include "csrc/nf4/codebook.h"

namespace {

using namespace squish;

// Written when the library is loaded: the functions do not allocate.
const auto kBadIsa = [] {
  std::array<char, 256> text;
  std::snprintf(text.data(), text.size(), "SQUISH_NF4_ISA must be %s, and one that this processor has",
                cpu::path_names().c_str());
  return text;
}();

struct Matrix {
  int64_t n, d, group_size, first_row, last_row;

  int64_t first_column() const { return first_row * d; }
  int64_t columns() const { return (last_row - first_row) * d; }
};

// Bytes of a value, which are its alignment too. The caller has looked at the dtype.
size_t size_of(int32_t dtype) {
  if (dtype == SQUISH_NF4_FLOAT64) return sizeof(double);
  return dtype == SQUISH_NF4_FLOAT32 ? sizeof(float) : sizeof(uint16_t);
}

bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Every other check, once for both directions.
int32_t check(const Matrix& m, const void* dense, int32_t dtype, const void* packed, const void* scales) {
  if (m.n < 0 || m.d < 0 || m.d % 2 != 0) return SQUISH_NF4_BAD_SIZE;
  if (m.d > 0 && m.n > std::numeric_limits<int64_t>::max() / 8 / m.d) return SQUISH_NF4_BAD_SIZE;
  if (m.group_size < 1 || m.d % m.group_size != 0) return SQUISH_NF4_BAD_GROUP;
  if (m.first_row < 0 || m.first_row > m.last_row || m.last_row > m.n) return SQUISH_NF4_BAD_ROWS;
  if (m.columns() > 0 && (dense == nullptr || packed == nullptr || scales == nullptr)) return SQUISH_NF4_NULL_POINTER;
  if (m.columns() > 0 && !(is_aligned(dense, size_of(dtype)) && is_aligned(scales, sizeof(float))))
    return SQUISH_NF4_MISALIGNED;
  return cpu::selection().error.empty() ? SQUISH_NF4_OK : SQUISH_NF4_BAD_ISA;
}

template <typename T>
void quantize(const Matrix& m, const void* w, uint8_t* packed, float* scales) {
  const int64_t at = m.first_column();
  const auto& codec = cpu::selection().path->codec<T>();
  codec.encode(static_cast<const T*>(w) + at, m.columns(), m.group_size, packed + at / 2, scales + at / m.group_size);
}

template <typename T>
void dequantize(const Matrix& m, const uint8_t* packed, const float* scales, void* out) {
  const int64_t at = m.first_column();
  const auto& codec = cpu::selection().path->codec<T>();
  codec.decode(packed + at / 2, scales + at / m.group_size, 0, m.columns(), m.group_size, static_cast<T*>(out) + at);
}

}  // namespace

int32_t squish_nf4_c_version(void) { return SQUISH_NF4_C_VERSION; }

const char* squish_nf4_message(int32_t status) {
  switch (status) {
    case SQUISH_NF4_OK:
      return "no error";
    case SQUISH_NF4_NULL_POINTER:
      return "a pointer is null, but there are rows to read and write";
    case SQUISH_NF4_BAD_DTYPE:
      return "dtype must be float32, bfloat16 or float16, or float64 to quantize";
    case SQUISH_NF4_BAD_SIZE:
      return "n and d must not be negative, d must be even, and n*d must fit the address space";
    case SQUISH_NF4_BAD_GROUP:
      return "group_size must be at least 1 and divide d";
    case SQUISH_NF4_BAD_ROWS:
      return "the rows must be 0 <= first_row <= last_row <= n";
    case SQUISH_NF4_BAD_ISA:
      return kBadIsa.data();
    case SQUISH_NF4_MISALIGNED:
      return "the address of a dense matrix or of the scales must be a multiple of the size of its values";
    default:
      return "unknown status";
  }
}

int32_t squish_nf4_quantize(const void* w, int32_t dtype, int64_t n, int64_t d, int64_t group_size, int64_t first_row,
                            int64_t last_row, uint8_t* packed, float* scales) {
  if (dtype < SQUISH_NF4_FLOAT32 || dtype > SQUISH_NF4_FLOAT64) return SQUISH_NF4_BAD_DTYPE;
  const Matrix m{n, d, group_size, first_row, last_row};
  if (const int32_t status = check(m, w, dtype, packed, scales); status != SQUISH_NF4_OK || m.columns() == 0)
    return status;
  const cpu::DefaultFloatEnvironment environment;
  if (dtype == SQUISH_NF4_FLOAT32) quantize<float>(m, w, packed, scales);
  if (dtype == SQUISH_NF4_BFLOAT16) quantize<nf4::BFloat16>(m, w, packed, scales);
  if (dtype == SQUISH_NF4_FLOAT16) quantize<nf4::Float16>(m, w, packed, scales);
  if (dtype == SQUISH_NF4_FLOAT64) quantize<double>(m, w, packed, scales);
  return SQUISH_NF4_OK;
}

int32_t squish_nf4_dequantize(const uint8_t* packed, const float* scales, int64_t n, int64_t d, int64_t group_size,
                              int64_t first_row, int64_t last_row, int32_t dtype, void* out) {
  if (dtype < SQUISH_NF4_FLOAT32 || dtype > SQUISH_NF4_FLOAT16) return SQUISH_NF4_BAD_DTYPE;
  const Matrix m{n, d, group_size, first_row, last_row};
  if (const int32_t status = check(m, out, dtype, packed, scales); status != SQUISH_NF4_OK || m.columns() == 0)
    return status;
  const cpu::DefaultFloatEnvironment environment;
  if (dtype == SQUISH_NF4_FLOAT32) dequantize<float>(m, packed, scales, out);
  if (dtype == SQUISH_NF4_BFLOAT16) dequantize<nf4::BFloat16>(m, packed, scales, out);
  if (dtype == SQUISH_NF4_FLOAT16) dequantize<nf4::Float16>(m, packed, scales, out);
  return SQUISH_NF4_OK;
}

int64_t squish_nf4_first_non_finite(const float* scales, int64_t count) {
  const auto* bytes = reinterpret_cast<const char*>(scales);  // there is no status for a misaligned pointer here
  for (int64_t i = 0; i < count; ++i) {
    float scale;
    std::memcpy(&scale, bytes + i * int64_t{sizeof scale}, sizeof scale);
    if (scale != scale) return i;
  }
  return -1;
}

const float* squish_nf4_levels(void) { return nf4::kLevels.data(); }

const char* squish_nf4_isa(void) {
  const cpu::Selection& selection = cpu::selection();
  return selection.error.empty() ? selection.path->name : nullptr;
}
