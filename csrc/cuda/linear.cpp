// Which kernel of the linear layer a call gets: the one on tensor cores where type, sizes and alignment allow, else,
// for very few activations, the plain one.
#include "csrc/cuda/linear.h"

#include <type_traits>

namespace squish::cuda {
namespace {

// Up to so many activations, the plain kernel does less work than to decode the weight and to multiply with that.
template <typename T>
constexpr int kMostPlainActivations = std::is_same_v<T, float> ? 32 : 16;
constexpr int64_t kMostPlainColumns = int64_t{1} << 26;  // so that 32 rows have fewer than 2^32 values

constexpr uintptr_t kLoad = sizeof(uint4);  // what the kernels load at once
bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kLoad == 0; }

template <typename T>
bool on_tensor_cores(const FewActivations<T>& call) {
  return !std::is_same_v<T, float> && is_aligned(call.packed) &&
         linear_small_m_takes(call.m, call.n, call.d, call.group_size);
}

}  // namespace

template <typename T>
bool linear_takes(const FewActivations<T>& call) {
  return on_tensor_cores(call) || (call.m <= kMostPlainActivations<T> && call.d <= kMostPlainColumns);
}

template <typename T>
int64_t linear_scratch(const FewActivations<T>& call) {
  if (!on_tensor_cores(call)) return 0;
  const bool is_whole = call.x_columns == call.d && (call.m == 1 || call.x_stride == call.d);
  const bool as_it_is = linear_small_m_reads_x(call.m, call.group_size) && is_whole && is_aligned(call.x);
  return as_it_is ? 0 : linear_small_m_scratch(call.m, call.d, call.group_size);
}

template <typename T>
cudaError_t linear(const FewActivations<T>& call, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, float>)
    if (on_tensor_cores(call)) return linear_small_m(call, stream);
  return linear_plain(call, stream);
}

#define SQUISH_INSTANTIATE_LINEAR(T)                         \
  template bool linear_takes(const FewActivations<T>&);      \
  template int64_t linear_scratch(const FewActivations<T>&); \
  template cudaError_t linear(const FewActivations<T>&, cudaStream_t)
SQUISH_INSTANTIATE_LINEAR(float);
SQUISH_INSTANTIATE_LINEAR(nf4::BFloat16);
SQUISH_INSTANTIATE_LINEAR(nf4::Float16);

}  // namespace squish::cuda
