// The launchers of csrc/cuda on a CUDA runtime without a GPU: what it would launch goes to a function of the test's.
// tests/support/ptx/host.py builds and calls this.
#include <cstring>
#include <map>
#include <string>

#include "csrc/cuda/kernels.h"

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

using Launch = int (*)(const char* kernel, const unsigned* sizes, void** arguments, size_t shared);

Launch on_launch = nullptr;
int capability = 90;
int multiprocessors = 132;
cudaError_t last_error = cudaSuccess;
Configuration pushed;
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> kernels;
  return kernels;
}
// What a block may have on a Hopper, and on a Turing.
int most_shared() { return capability >= 80 ? 227 << 10 : 64 << 10; }
std::map<const void*, int> shared_limits;  // what a kernel may have beyond 48 KiB, once it has been asked for

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared) {
  constexpr size_t kWithoutAsking = 48 << 10;
  const auto limit = shared_limits.find(kernel);
  const size_t most = limit == shared_limits.end() ? kWithoutAsking : static_cast<size_t>(limit->second);
  const bool sizes_are_right = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.y < 65536 && grid.z < 65536;
  const unsigned sizes[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  if (shared > most || !sizes_are_right || !on_launch) {
    last_error = cudaErrorInvalidValue;
  } else if (on_launch(names()[kernel].c_str(), sizes, arguments, shared) != 0) {
    last_error = cudaErrorLaunchFailure;
  }
  return last_error;
}

}  // namespace

extern "C" {

void test_setup(Launch function, int compute_capability, int processors) {
  on_launch = function, capability = compute_capability, multiprocessors = processors;
}

// --- What the compiler's stubs and the launchers call
// -----------------------------------------------------------------

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[stub] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared;
  std::memcpy(stream, &pushed.stream, sizeof pushed.stream);
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return launch(kernel, grid, block, arguments, shared);
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return launch(kernel, grid, block, arguments, shared);
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability / 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = most_shared();
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > most_shared()) return cudaErrorInvalidValue;
  shared_limits[kernel] = value;
  return cudaSuccess;
}

// --- The launchers, by names that C can say
// ---------------------------------------------------------------------------

#define QUANTIZE(name, T)                                                                                             \
  int name(const void* w, int64_t n, int64_t d, int64_t row_stride, int64_t group_size, void* packed, void* scales) { \
    return squish::cuda::quantize(static_cast<const T*>(w), n, d, row_stride, group_size,                             \
                                  static_cast<uint8_t*>(packed), static_cast<float*>(scales), nullptr);               \
  }
#define DEQUANTIZE(name, T)                                                                                        \
  int name(const void* packed, const void* scales, int64_t count, int64_t group_size, void* out) {                 \
    return squish::cuda::dequantize(static_cast<const uint8_t*>(packed), static_cast<const float*>(scales), count, \
                                    group_size, static_cast<T*>(out), nullptr);                                    \
  }
#define SURVEY(name, T)                                                                                              \
  int name(const void* w, int64_t n, int64_t d, int64_t row_stride, const void* packed, const void* scales,          \
           int64_t row_bytes, int64_t group_size, void* out) {                                                       \
    return squish::cuda::survey(static_cast<const T*>(w), n, d, row_stride, static_cast<const uint8_t*>(packed),     \
                                static_cast<const float*>(scales), row_bytes, group_size, static_cast<double*>(out), \
                                nullptr);                                                                            \
  }
#define LINEAR_PARAMETERS                                                                                              \
  const void *x, const void *packed, const void *scales, const void *bias, const void *bias32, void *y, void *scratch, \
      int64_t m, int64_t n, int64_t d, int64_t x_columns, int64_t x_stride, int64_t group_size
#define LINEAR_CALL(T)                                                                                        \
  squish::cuda::FewActivations<T> {                                                                           \
    static_cast<const T*>(x), static_cast<const uint8_t*>(packed), static_cast<const float*>(scales),         \
        static_cast<const T*>(bias), static_cast<const float*>(bias32), static_cast<T*>(y), scratch, m, n, d, \
        x_columns, x_stride, group_size                                                                       \
  }
#define LINEAR(name, T)                                                                          \
  int name(LINEAR_PARAMETERS) { return squish::cuda::linear(LINEAR_CALL(T), nullptr); }          \
  int64_t name##_takes(LINEAR_PARAMETERS) { return squish::cuda::linear_takes(LINEAR_CALL(T)); } \
  int64_t name##_scratch(LINEAR_PARAMETERS) { return squish::cuda::linear_scratch(LINEAR_CALL(T)); }

QUANTIZE(quantize_float32, float)
QUANTIZE(quantize_float64, double)
QUANTIZE(quantize_bfloat16, squish::nf4::BFloat16)
QUANTIZE(quantize_float16, squish::nf4::Float16)
DEQUANTIZE(dequantize_float32, float)
DEQUANTIZE(dequantize_bfloat16, squish::nf4::BFloat16)
DEQUANTIZE(dequantize_float16, squish::nf4::Float16)
SURVEY(survey_float32, float)
SURVEY(survey_float64, double)
SURVEY(survey_bfloat16, squish::nf4::BFloat16)
SURVEY(survey_float16, squish::nf4::Float16)
LINEAR(linear_float32, float)
LINEAR(linear_bfloat16, squish::nf4::BFloat16)
LINEAR(linear_float16, squish::nf4::Float16)

}  // extern "C"
