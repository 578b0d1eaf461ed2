// What rows of weights and their NF4 form say about each other: to the bit the sums of the CPU (but for the bits of a
// NaN), which are those of sixteen running sums, of which column c goes to number c % 16.
#include "csrc/cuda/device.cuh"
#include "csrc/cuda/kernels.h"

namespace squish::cuda {
namespace {

__device__ const nf4::Codebook codebook = nf4::kCodebook;  // a copy made by the compiler, not by a person

constexpr int kLanes = 16;  // of a row: each keeps one of the running sums

// The running sums of all lanes, one added after the other.
__device__ inline double added_in_order(double own) {
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += __shfl_sync(kWholeWarp, own, lane, kLanes);
  return total;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    survey_rows(const T* __restrict__ w, int64_t n, int64_t d, int64_t row_stride, const uint8_t* __restrict__ packed,
                const float* __restrict__ scales, int64_t row_bytes, int64_t group_size, double* __restrict__ out) {
  const int lane = threadIdx.x % kLanes;
  const int64_t wanted = blockIdx.x * int64_t{kThreads / kLanes} + threadIdx.x / kLanes;
  const int64_t row = min(wanted, n - 1);  // past the end: all lanes of a warp stay for its shuffles
  const T* from = w + row * row_stride;
  const uint8_t* bytes = packed + row * row_bytes;
  const float* scale = scales + row * (2 * row_bytes / group_size);
  uint32_t largest = 0;
  double sum = 0, square = 0, squared_error = 0;
  int64_t next_group = group_size;
  for (int64_t c = lane; c < d; c += kLanes) {
    for (; c >= next_group; next_group += group_size) ++scale;
    const uint8_t byte = bytes[c / 2];
    const uint32_t index = c % 2 == 0 ? nf4::even_index(byte) : nf4::odd_index(byte);
    const float exact = nf4::to_float(from[c]);
    const auto value = static_cast<double>(exact);
    const auto lost = static_cast<double>(exact - nf4::decode<float>(index, *scale, codebook.level));
    largest = nf4::larger(largest, nf4::bits_of(exact) & nf4::kMagnitudeMask);
    sum += fabs(value);
    square += value * value;
    squared_error += lost * lost;
  }
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    largest = nf4::larger(largest, __shfl_xor_sync(kWholeWarp, largest, offset));
  const double found[] = {static_cast<double>(nf4::float_of(largest)), added_in_order(sum), added_in_order(square),
                          added_in_order(squared_error)};
  if (lane != 0 || wanted >= n) return;
#pragma unroll
  for (int k = 0; k < 4; ++k) out[4 * row + k] = found[k];
}

}  // namespace

template <typename T>
cudaError_t survey(const T* w, int64_t n, int64_t d, int64_t row_stride, const uint8_t* packed, const float* scales,
                   int64_t row_bytes, int64_t group_size, double* out, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  constexpr int64_t kRows = kThreads / kLanes;
  const auto blocks = static_cast<unsigned>((n + kRows - 1) / kRows);
  survey_rows<<<blocks, kThreads, 0, stream>>>(w, n, d, row_stride, packed, scales, row_bytes, group_size, out);
  return cudaGetLastError();
}

#define SQUISH_INSTANTIATE_SURVEY(T)                                                                               \
  template cudaError_t survey(const T*, int64_t, int64_t, int64_t, const uint8_t*, const float*, int64_t, int64_t, \
                              double*, cudaStream_t)
SQUISH_INSTANTIATE_SURVEY(float);
SQUISH_INSTANTIATE_SURVEY(double);
SQUISH_INSTANTIATE_SURVEY(nf4::BFloat16);
SQUISH_INSTANTIATE_SURVEY(nf4::Float16);

}  // namespace squish::cuda
