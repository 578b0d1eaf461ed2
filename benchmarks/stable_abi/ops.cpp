// The operators once more, registered through LibTorch's stable ABI as squish_stable::*: the same torch-free kernels
// and checks, nothing from ATen or c10. It is written to be fast: sizes, data and allocation come from C functions.
// Left out: the linear's path for large batches and its gradient, which would show nothing new.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "csrc/cpu/dispatch.h"
#include "csrc/cpu/float_environment.h"

namespace squish::stable {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ValueError, until torch 2.15 made it RuntimeError. Nothing here can become TypeError: a wrong dtype is RuntimeError.
using ValueError = std::invalid_argument;

template <typename Error = std::runtime_error, typename... Parts>
void check(bool good, const char* op, const Parts&... parts) {
  if (good) return;
  std::ostringstream text;
  ((text << op << ": ") << ... << parts);
  throw Error(text.str());
}

bool is_compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

void check_group_size(const char* op, int64_t group_size) {
  constexpr int64_t kMost = int64_t{1} << 40;
  check<ValueError>(group_size >= 1, op, "group_size must be at least 1, got ", group_size);
  check<ValueError>(group_size <= kMost, op, "group_size must be at most ", kMost, ", got ", group_size);
}

void check_weight(const Tensor& w, int64_t group_size) {
  constexpr auto op = "quantize_nf4";
  const ScalarType dtype = w.scalar_type();
  check(is_compute_dtype(dtype) || dtype == ScalarType::Double, op,
        "w must be float32, bfloat16, float16 or float64, got ", dtype);
  check<ValueError>(w.dim() == 2, op, "w must be 2-D (rows, columns), got ", w.dim(), "-D");
  check_group_size(op, group_size);
  const int64_t d = w.size(1);
  check<ValueError>(d % 2 == 0, op, "w has ", d, " columns; two share a byte, so their number must be even");
  check<ValueError>(d % group_size == 0, op, "w has ", d, " columns, not a multiple of group_size=", group_size);
}

void check_packed(const char* op, const Tensor& packed, const Tensor& scales, int64_t group_size) {
  check(scales.device() == packed.device(), op, "scales and packed must be on one device");
  check(packed.scalar_type() == ScalarType::Byte, op, "packed must be uint8, got ", packed.scalar_type());
  check(scales.scalar_type() == ScalarType::Float, op, "scales must be float32, got ", scales.scalar_type());
  check<ValueError>(packed.dim() == 2, op, "packed must be 2-D (rows, columns/2), got ", packed.dim(), "-D");
  check<ValueError>(scales.dim() == 2, op, "scales must be 2-D (rows, columns/group_size), got ", scales.dim(), "-D");
  check_group_size(op, group_size);
  const int64_t n = packed.size(0), d = packed.size(1) * 2;
  check<ValueError>(scales.size(0) == n, op, "scales has ", scales.size(0), " rows but packed has ", n);
  check<ValueError>(d % group_size == 0, op, "packed holds ", d, " columns, not a multiple of group_size=", group_size);
  check<ValueError>(scales.size(1) * group_size == d, op, "scales has ", scales.size(1), " columns; packed holds ", d,
                    " columns, which at group_size=", group_size, " need ", d / group_size);
}

void check_linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& bias,
                  int64_t group_size) {
  constexpr auto op = "linear_nf4";
  check(packed.device() == x.device(), op, "packed and x must be on one device");
  check(is_compute_dtype(x.scalar_type()), op, "x must be float32, bfloat16 or float16, got ", x.scalar_type());
  check_packed(op, packed, scales, group_size);
  check<ValueError>(x.dim() >= 1, op, "x must have at least one dimension, got a scalar");
  const int64_t d = x.size(x.dim() - 1), columns = packed.size(1) * 2, block = std::lcm(int64_t{2}, group_size);
  check<ValueError>(d <= columns && columns < d + block, op, "x has ", d, " columns but packed holds ", columns);
  if (!bias) return;
  check(bias->device() == x.device(), op, "bias and x must be on one device");
  check(is_compute_dtype(bias->scalar_type()), op, "bias must be float32, bfloat16 or float16, got ",
        bias->scalar_type());
  check<ValueError>(bias->dim() == 1 && bias->size(0) == packed.size(0), op, "bias must have ", packed.size(0),
                    " elements");
}

Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  using torch::stable::detail::from, torch::stable::detail::to;
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), to<int32_t>(from(dtype)), device,
                                                         like.get_device_index(), &result));
  return Tensor(result);
}

Tensor in_one_piece(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

const cpu::Path& path() {
  const cpu::Selection& selection = cpu::selection();
  if (!selection.error.empty()) throw ValueError(selection.error);
  return *selection.path;
}

// Calls with(T{}) for the type that a dtype's values are stored in.
template <typename With>
void with_storage_type(ScalarType dtype, const With& with) {
  if (dtype == ScalarType::Double) return with(double{});
  if (dtype == ScalarType::Float) return with(float{});
  if (dtype == ScalarType::BFloat16) return with(nf4::BFloat16{});
  with(nf4::Float16{});
}

// Calls run(first_column, columns) for stretches of a contiguous matrix of `count` columns in all, on torch's threads.
template <typename Run>
void for_each_stretch(int64_t count, int64_t group_size, const Run& run) {
  const int64_t block = std::lcm(int64_t{2}, group_size);
  torch::stable::parallel_for(0, count / block, std::max<int64_t>(1, 32768 / block), [&](int64_t begin, int64_t end) {
    const cpu::DefaultFloatEnvironment environment;
    run(begin * block, (end - begin) * block);
  });
}

// From here on kRun tells the CPU kernel from the Meta kernel, which stops when the result is allocated.

template <bool kRun>
std::tuple<Tensor, Tensor> quantize_nf4(const Tensor& weight, int64_t group_size) {
  check_weight(weight, group_size);
  const int64_t n = weight.size(0), d = weight.size(1);
  Tensor packed = empty({n, d / 2}, ScalarType::Byte, weight);
  Tensor scales = empty({n, d / group_size}, ScalarType::Float, weight);
  if constexpr (kRun) {
    const Tensor w = in_one_piece(weight);
    auto* bytes = static_cast<uint8_t*>(packed.mutable_data_ptr());
    auto* scale = static_cast<float*>(scales.mutable_data_ptr());
    with_storage_type(w.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const T* values = static_cast<const T*>(w.const_data_ptr());
      for_each_stretch(n * d, group_size, [&, encode = path().codec<T>().encode](int64_t at, int64_t count) {
        encode(values + at, count, group_size, bytes + at / 2, scale + at / group_size);
      });
    });
  }
  return {packed, scales};
}

void decode(const Tensor& packed, const Tensor& scales, int64_t group_size, const Tensor& out) {
  const Tensor p = in_one_piece(packed), s = in_one_piece(scales);
  const auto* bytes = static_cast<const uint8_t*>(p.const_data_ptr());
  const auto* scale = static_cast<const float*>(s.const_data_ptr());
  with_storage_type(out.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, double>) {
      T* values = static_cast<T*>(out.mutable_data_ptr());
      for_each_stretch(out.numel(), group_size, [&, kernel = path().codec<T>().decode](int64_t at, int64_t count) {
        kernel(bytes + at / 2, scale + at / group_size, 0, count, group_size, values + at);
      });
    }
  });
}

template <bool kRun>
Tensor dequantize_nf4(const Tensor& packed, const Tensor& scales, int64_t group_size, std::optional<ScalarType> dtype) {
  constexpr auto op = "dequantize_nf4";
  check_packed(op, packed, scales, group_size);
  const ScalarType wanted = dtype.value_or(ScalarType::Float);
  check(is_compute_dtype(wanted), op, "dtype must be float32, bfloat16 or float16, got ", wanted);
  Tensor out = empty({packed.size(0), packed.size(1) * 2}, wanted, packed);
  if constexpr (kRun) decode(packed, scales, group_size, out);
  return out;
}

template <typename Element, typename T>
void multiply(const cpu::LinearKernels<Element>& linear, const Tensor& x, const Tensor& packed, const Tensor& scales,
              const float* bias, int64_t group_size, const Tensor& y) {
  const int64_t d = x.size(x.dim() - 1), n = packed.size(0), m = y.numel() / n, columns = packed.size(1) * 2;
  const int64_t floats = m * cpu::packed_elements(linear, columns) * int64_t{sizeof(Element)} / 4;
  const Tensor buffer = empty({floats}, ScalarType::Float, x);
  auto* activations = static_cast<Element*>(buffer.mutable_data_ptr());
  {
    const cpu::DefaultFloatEnvironment environment;
    cpu::pack_activations(linear, static_cast<const T*>(x.const_data_ptr()), m, d, d, columns, 0, m, activations);
  }
  const cpu::LinearTask<Element, T> task{.kernels = linear,
                                         .packed = static_cast<const uint8_t*>(packed.const_data_ptr()),
                                         .scales = static_cast<const float*>(scales.const_data_ptr()),
                                         .columns = columns,
                                         .group_size = group_size,
                                         .x = activations,
                                         .m = m,
                                         .bias = bias,
                                         .y = static_cast<T*>(y.mutable_data_ptr()),
                                         .y_stride = n};
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(columns, 1));
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    const cpu::DefaultFloatEnvironment environment;
    const Tensor scratch = empty({cpu::linear_scratch_bytes<Element>(m) / 4}, ScalarType::Float, x);
    cpu::linear_rows(task, begin, end, scratch.mutable_data_ptr());
  });
}

template <bool kRun>
Tensor linear_nf4(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& bias,
                  int64_t group_size) {
  check_linear(x, packed, scales, bias, group_size);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = packed.size(0);
  const Tensor y = empty(shape, x.scalar_type(), x);
  if constexpr (kRun) {
    if (y.numel() == 0) return y;
    std::optional<Tensor> b;
    if (bias) b = in_one_piece(torch::stable::to(*bias, ScalarType::Float));
    const float* bias_values = b ? static_cast<const float*>(b->const_data_ptr()) : nullptr;
    with_storage_type(x.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      if constexpr (!std::is_same_v<T, double>) {
        const Tensor rows = in_one_piece(x), p = in_one_piece(packed), s = in_one_piece(scales);
        if constexpr (std::is_same_v<T, nf4::BFloat16>)
          if (path().linear_bfloat16 != nullptr)
            return multiply<T, T>(*path().linear_bfloat16, rows, p, s, bias_values, group_size, y);
        multiply<float, T>(*path().linear, rows, p, s, bias_values, group_size, y);
      }
    });
  }
  return y;
}

template <bool kRun>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("quantize_nf4", TORCH_BOX(&quantize_nf4<kRun>));
  m.impl("dequantize_nf4", TORCH_BOX(&dequantize_nf4<kRun>));
  m.impl("linear_nf4", TORCH_BOX(&linear_nf4<kRun>));
}

}  // namespace

STABLE_TORCH_LIBRARY(squish_stable, m) {
  m.def("quantize_nf4(Tensor w, int group_size=32) -> (Tensor packed, Tensor scales)");
  m.def("dequantize_nf4(Tensor packed, Tensor scales, int group_size=32, *, ScalarType? dtype=None) -> Tensor");
  m.def("linear_nf4(Tensor x, Tensor packed, Tensor scales, Tensor? bias=None, int group_size=32) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(squish_stable, CPU, m) { implement<true>(m); }

STABLE_TORCH_LIBRARY_IMPL(squish_stable, Meta, m) { implement<false>(m); }

}  // namespace squish::stable
