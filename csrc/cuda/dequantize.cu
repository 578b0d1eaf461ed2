// Packed bytes and scales to weights. Group sizes that fill whole 16-byte stores take the fast kernel; the plain one
// takes every other group size and every alignment.
#include <bit>
#include <type_traits>

#include "csrc/cuda/device.cuh"
#include "csrc/cuda/kernels.h"

namespace squish::cuda {
namespace {

__device__ const nf4::Codebook codebook = nf4::kCodebook;  // a copy made by the compiler, not by a person

// The packed bytes of one 16-byte store: of 8 columns in 16 bits, or 4 in float32.
template <typename T>
using Bytes = std::conditional_t<sizeof(T) == 2, uint32_t, uint16_t>;

// NaN has one pattern in the format, and the processor another.
template <typename T>
__device__ inline T with_one_nan(T rounded, float product) {
  return product == product ? rounded : nf4::from_float<T>(nf4::quiet_nan());
}

__device__ inline void round_pair(float even, float odd, float* to) {
  to[0] = even;
  to[1] = odd;
}
__device__ inline void round_pair(float even, float odd, nf4::BFloat16* to) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(even, odd);
  to[0].bits = __bfloat16_as_ushort(pair.x);
  to[1].bits = __bfloat16_as_ushort(pair.y);
}
__device__ inline void round_pair(float even, float odd, nf4::Float16* to) {
  const __half2 pair = __floats2half2_rn(even, odd);
  to[0].bits = __half_as_ushort(__low2half(pair));
  to[1].bits = __half_as_ushort(__high2half(pair));
}

// A lane decodes kSteps times the columns of one store, kThreads stores apart, so that a warp stores whole lines. A
// store's columns are of one group; the scale of store v is number v >> group, or v / group, if group is no power of
// two. The sixteen levels lie in the lanes of a half warp.
template <int kSteps, bool kShift, typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_vectors(const Bytes<T>* __restrict__ packed, const float* __restrict__ scales, int64_t vectors,
                       int64_t group, Vector<T>* __restrict__ out) {
  const float level = codebook.level[threadIdx.x % nf4::kLevelCount];
  const int64_t first = blockIdx.x * int64_t{kThreads * kSteps} + threadIdx.x;
  Bytes<T> bytes[kSteps] = {};
  float scale[kSteps] = {};
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int64_t v = first + s * kThreads;
    if (v >= vectors) continue;
    bytes[s] = __ldcs(packed + v);
    scale[s] = __ldg(scales + (kShift ? v >> group : v / group));
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int64_t v = first + s * kThreads;
    constexpr int kColumns = Vector<T>::kValues;
    float product[kColumns];
    Vector<T> result;
#pragma unroll
    for (int k = 0; k < kColumns; ++k)
      product[k] = __shfl_sync(kWholeWarp, level, bytes[s] >> (4 * k), nf4::kLevelCount) * scale[s];
#pragma unroll
    for (int k = 0; k < kColumns; k += 2) round_pair(product[k], product[k + 1], result.value + k);
    if ((nf4::bits_of(scale[s]) & nf4::kMagnitudeMask) >= nf4::kInfinityBits) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) result.value[k] = with_one_nan(result.value[k], product[k]);
    }
    if (v < vectors) store_once(out + v, result);
  }
}

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T even, odd;
};

// A thread decodes one byte. kPairs: the results are aligned to two.
template <bool kPairs, typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_bytes(const uint8_t* __restrict__ packed, const float* __restrict__ scales, int64_t count,
                     int64_t group_size, T* __restrict__ out) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t j = blockIdx.x * int64_t{kThreads} + threadIdx.x; j < count / 2; j += step) {
    const uint8_t byte = packed[j];
    const float even_scale = scales[2 * j / group_size], odd_scale = scales[(2 * j + 1) / group_size];
    const Pair<T> pair{nf4::decode<T>(nf4::even_index(byte), even_scale, codebook.level),
                       nf4::decode<T>(nf4::odd_index(byte), odd_scale, codebook.level)};
    if constexpr (kPairs) {
      reinterpret_cast<Pair<T>*>(out)[j] = pair;
    } else {
      out[2 * j] = pair.even;
      out[2 * j + 1] = pair.odd;
    }
  }
}

}  // namespace

template <typename T>
cudaError_t dequantize(const uint8_t* packed, const float* scales, int64_t count, int64_t group_size, T* out,
                       cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  constexpr int kColumns = Vector<T>::kValues;
  constexpr int kSteps = 2;
  // `out` and `packed` may be views that start anywhere in a tensor of the caller's, so their alignment is looked at.
  if (group_size % kColumns == 0 && is_aligned<Bytes<T>>(packed) && is_aligned<Vector<T>>(out)) {
    const int64_t vectors = count / kColumns, group = group_size / kColumns, per_block = kThreads * kSteps;
    const auto blocks = static_cast<unsigned>((vectors + per_block - 1) / per_block);
    const auto* bytes = reinterpret_cast<const Bytes<T>*>(packed);
    auto* to = reinterpret_cast<Vector<T>*>(out);
    if ((group & (group - 1)) == 0) {
      const int64_t shift = std::countr_zero(static_cast<uint64_t>(group));
      dequantize_vectors<kSteps, true, T><<<blocks, kThreads, 0, stream>>>(bytes, scales, vectors, shift, to);
    } else {
      dequantize_vectors<kSteps, false, T><<<blocks, kThreads, 0, stream>>>(bytes, scales, vectors, group, to);
    }
    return cudaGetLastError();
  }
  const unsigned blocks = grid_for(count / 2, kThreads);
  if (is_aligned<Pair<T>>(out)) {
    dequantize_bytes<true><<<blocks, kThreads, 0, stream>>>(packed, scales, count, group_size, out);
  } else {
    dequantize_bytes<false><<<blocks, kThreads, 0, stream>>>(packed, scales, count, group_size, out);
  }
  return cudaGetLastError();
}

#define SQUISH_INSTANTIATE_DEQUANTIZE(T) \
  template cudaError_t dequantize(const uint8_t*, const float*, int64_t, int64_t, T*, cudaStream_t)
SQUISH_INSTANTIATE_DEQUANTIZE(float);
SQUISH_INSTANTIATE_DEQUANTIZE(nf4::BFloat16);
SQUISH_INSTANTIATE_DEQUANTIZE(nf4::Float16);

}  // namespace squish::cuda
