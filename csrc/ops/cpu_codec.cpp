// quantize_nf4 and dequantize_nf4 on the CPU.
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/cpu_matrix.h"
#include "csrc/ops/readable.h"

namespace squish::ops {
namespace {

template <typename T>
void encode(cpu::Encode<T> kernel, const Tensor& w, int64_t group_size, const Tensor& packed, const Tensor& scales) {
  const int64_t n = w.size(0), d = w.size(1), row_stride = w.stride(0);
  const bool contiguous = w.is_contiguous();
  const T* values = static_cast<const T*>(w.const_data_ptr());
  uint8_t* bytes = packed.mutable_data_ptr<uint8_t>();
  float* scale = scales.mutable_data_ptr<float>();
  for_each_stretch(n, d, group_size, contiguous, [&](int64_t at, int64_t count) {
    const T* from = contiguous ? values + at : values + (at / d) * row_stride + at % d;
    kernel(from, count, group_size, bytes + at / 2, scale + at / group_size);
  });
}

std::tuple<Tensor, Tensor> quantize_nf4(const Tensor& weight, int64_t group_size) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_weight(weight, group_size);
  const cpu::Path& path = selected();
  // Rows may lie anywhere; only the columns of a row must be neighbours.
  const Tensor w = readable_rows(weight);
  const int64_t n = w.size(0), d = w.size(1);
  Tensor packed = at::empty({n, d / 2}, w.options().dtype(at::kByte));
  Tensor scales = at::empty({n, d / group_size}, w.options().dtype(at::kFloat));
  with_weight_type(w.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    encode<T>(path.codec<T>().encode, w, group_size, packed, scales);
  });
  return {std::move(packed), std::move(scales)};
}

Tensor dequantize_nf4(const Tensor& packed, const Tensor& scales, int64_t group_size,
                      std::optional<at::ScalarType> dtype) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_dequantize(packed, scales, group_size, dtype);
  const cpu::Path& path = selected();
  Tensor out = at::empty({packed.size(0), packed.size(1) * 2}, packed.options().dtype(dtype.value_or(at::kFloat)));
  decode_matrix(path, readable(packed), readable(scales), group_size, out);
  return out;
}

Tensor& dequantize_nf4_out(const Tensor& packed, const Tensor& scales, int64_t group_size, Tensor& out) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_dequantize_out(packed, scales, group_size, out);
  check_aligned("dequantize_nf4", "out", out);
  at::assert_no_overlap(out, packed);
  at::assert_no_overlap(out, scales);
  decode_matrix(selected(), readable(packed), readable(scales), group_size, out, stores_for(out, group_size));
  return out;
}

// (n, 4) float64: of each row the largest magnitude, the sum of magnitudes, the squared norm, and that of what is lost.
Tensor survey_nf4(const Tensor& weight, const Tensor& packed, const Tensor& scales, int64_t group_size) {
  at::AutoDispatchBelowADInplaceOrView below;
  check_survey(weight, packed, scales, group_size);
  const cpu::Path& path = selected();
  const Tensor w = readable_rows(weight);
  const Tensor bytes = readable(packed), scale = readable(scales);
  const int64_t n = w.size(0), d = w.size(1), row_bytes = bytes.size(1), groups = scale.size(1);
  Tensor result = at::empty({n, 4}, w.options().dtype(at::kDouble));
  with_weight_type(w.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* values = static_cast<const T*>(w.const_data_ptr());
    const uint8_t* byte = bytes.const_data_ptr<uint8_t>();
    const float* factor = scale.const_data_ptr<float>();
    double* out = result.mutable_data_ptr<double>();
    const auto survey = path.codec<T>().survey;
    parallel_for(
        0, n, std::max<int64_t>(1, kColumnsPerThread / std::max<int64_t>(d, 1)), [&](int64_t begin, int64_t end) {
          const cpu::DefaultFloatEnvironment environment;
          for (int64_t row = begin; row < end; ++row) {
            const cpu::RowSurvey found =
                survey(values + row * w.stride(0), d, byte + row * row_bytes, factor + row * groups, group_size);
            const double numbers[] = {found.largest, found.sum, found.square, found.squared_error};
            std::copy_n(numbers, 4, out + 4 * row);
          }
        });
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(squish, CPU, m) {
  m.impl("quantize_nf4", &quantize_nf4);
  m.impl("dequantize_nf4", &dequantize_nf4);
  m.impl("dequantize_nf4.out", &dequantize_nf4_out);
  m.impl("_survey_nf4", &survey_nf4);
}

}  // namespace squish::ops
