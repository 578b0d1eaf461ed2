// Weights to packed bytes and scales. Groups of 8 to 256 weights, a power of two, take the fast kernel; the plain one
// takes every other group size, every alignment and float64.
#include <type_traits>

#include "csrc/cuda/bins.h"
#include "csrc/cuda/device.cuh"
#include "csrc/cuda/kernels.h"

namespace squish::cuda {
namespace {

__constant__ nf4::Codebook codebook = nf4::kCodebook;  // copies made by the compiler, not by a person
__device__ const Bins bin_table = kBinTable;           // read once by every lane, each its own entry

constexpr int kColumns = 8;  // of a lane of the fast kernel: they fill one 32-bit word of packed bytes

struct Lane {
  float boundary;
  uint32_t below;
};

// Scales for which neither the reciprocal nor a remainder below leaves the normal floats.
__device__ inline bool is_ordinary(float scale) {
  constexpr uint32_t kLeast = 0x0e000000, kAbove = 0x70800000;  // 2^-99, 2^98
  return nf4::bits_of(scale) - kLeast < kAbove - kLeast;
}

// w / scale correctly rounded, for an ordinary scale: one Newton step on the product with the reciprocal.
__device__ inline float quotient(float w, float scale, float reciprocal) {
  const float near = w * reciprocal;
  return __fmaf_rn(__fmaf_rn(-near, scale, w), reciprocal, near);
}

// Weights of 8 or 11 significant bits never lie so near a boundary that the product could fall on its other side:
// tests/cuda/test_arithmetic.py tries every pair of significands.
template <typename T>
__device__ inline float quotient_for(T, float w, float scale, float reciprocal) {
  return std::is_same_v<T, float> ? quotient(w, scale, reciprocal) : w * reciprocal;
}

// Eight weights under any scale, as the definition has it. Out of line: almost no group needs it.
template <typename T>
__device__ __noinline__ uint32_t encode_plainly(const T* w, float scale) {
  uint32_t word = 0;
  for (int k = 0; k < kColumns; ++k) word |= nf4::encode(nf4::to_float(w[k]), scale, codebook.boundary) << (4 * k);
  return word;
}

// Eight weights of a row as they lie in memory.
template <typename T>
struct Octet {
  static constexpr int kWords = kColumns * sizeof(T) / 4;
  uint32_t word[kWords];
};

template <typename T>
__device__ inline Octet<T> load_octet(const T* from) {
  Octet<T> octet;
#pragma unroll
  for (int i = 0; i < Octet<T>::kWords; i += 4) {
    const uint4 words = *reinterpret_cast<const uint4*>(reinterpret_cast<const uint32_t*>(from) + i);
    octet.word[i] = words.x, octet.word[i + 1] = words.y, octet.word[i + 2] = words.z, octet.word[i + 3] = words.w;
  }
  return octet;
}

__device__ inline void widen(const Octet<float>& octet, float (&value)[kColumns]) {
#pragma unroll
  for (int k = 0; k < kColumns; ++k) value[k] = nf4::float_of(octet.word[k]);
}
__device__ inline void widen(const Octet<nf4::BFloat16>& octet, float (&value)[kColumns]) {
#pragma unroll
  for (int k = 0; k < kColumns; k += 2) {
    value[k] = nf4::float_of(octet.word[k / 2] << 16);
    value[k + 1] = nf4::float_of(octet.word[k / 2] & 0xffff0000u);
  }
}
__device__ inline void widen(const Octet<nf4::Float16>& octet, float (&value)[kColumns]) {
#pragma unroll
  for (int k = 0; k < kColumns; k += 2) {
    value[k] = __half2float(__ushort_as_half(static_cast<unsigned short>(octet.word[k / 2])));
    value[k + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(octet.word[k / 2] >> 16)));
  }
}

// The packed bytes of eight weights under an ordinary scale. All lanes of the warp call it together: each keeps a bin.
template <typename T>
__device__ inline uint32_t encode(const float (&value)[kColumns], float scale, const Lane& own) {
  const float reciprocal = __frcp_rn(scale);
  uint32_t word = 0;
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    const float quotient = quotient_for(T{}, value[k], scale, reciprocal);
    const int bin = __float_as_int(__fmaf_rn(quotient, kBinsPerUnit, kBinOffset));  // a shuffle takes the low five bits
    const float boundary = __shfl_sync(kWholeWarp, own.boundary, bin);
    word += __shfl_sync(kWholeWarp, own.below, bin) << (4 * k);
    if (quotient > boundary) word += 1u << (4 * k);
  }
  return word;
}

// A lane takes kSteps times eight neighbouring weights; kLanes lanes hold a group. `octets`: of a row; rows are
// row_stride weights apart and aligned to 16 bytes. Lanes past the end of a row work on zeros and do not store.
template <int kLanes, int kSteps, typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_octets(const T* __restrict__ w, int64_t n, int64_t octets, int64_t row_stride,
                    uint32_t* __restrict__ packed, float* __restrict__ scales) {
  const Lane own{bin_table.boundary[threadIdx.x % kWarp], bin_table.below[threadIdx.x % kWarp]};
  const int64_t first = blockIdx.x * int64_t{kThreads * kSteps} + threadIdx.x;
  const int left = static_cast<int>(min(octets - first, int64_t{kThreads * kSteps}));
  for (int64_t row = blockIdx.y; row < n; row += gridDim.y) {
    const T* from = w + row * row_stride + first * kColumns;
    uint32_t* to = packed + row * octets + first;
    float* scale_to = scales + (row * octets + first) / kLanes;
    Octet<T> octet[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
      octet[s] = s * kThreads < left ? load_octet(from + s * kThreads * kColumns) : Octet<T>{};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      float value[kColumns];
      widen(octet[s], value);
      uint32_t absmax = 0;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) absmax = max(absmax, nf4::bits_of(value[k]) & nf4::kMagnitudeMask);
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2)
        absmax = max(absmax, __shfl_xor_sync(kWholeWarp, absmax, offset));
      const float scale = nf4::scale_of(absmax);
      uint32_t word = encode<T>(value, scale, own);
      if (s * kThreads >= left) continue;
      if (!is_ordinary(scale)) word = encode_plainly(from + s * kThreads * kColumns, scale);
      to[s * kThreads] = word;
      if (threadIdx.x % kLanes == 0) scale_to[s * (kThreads / kLanes)] = scale;
    }
  }
}

// `kLanes` neighbouring threads take a block of columns: one group, or two if group_size is odd and they share a byte.
// All threads of a warp stay until its last shuffle: those past the end work on the last block again and do not store.
template <int kLanes, typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_blocks(const T* __restrict__ w, int64_t blocks, int64_t blocks_per_row, int64_t row_stride,
                    int64_t group_size, uint8_t* __restrict__ packed, float* __restrict__ scales) {
  const int lane = threadIdx.x % kLanes;
  const int groups = group_size % 2 == 0 ? 1 : 2;
  const int64_t columns = groups * group_size;
  const int64_t blocks_per_grid = int64_t{gridDim.x} * (kThreads / kLanes);
  const int64_t first = blockIdx.x * int64_t{kThreads / kLanes} + threadIdx.x / kLanes;
  // The number of rounds is the same for all threads of the grid, so that no shuffle waits for a thread that left.
  for (int64_t round = 0; round * blocks_per_grid < blocks; ++round) {
    const int64_t wanted = first + round * blocks_per_grid;
    const bool mine = wanted < blocks;
    const int64_t block = mine ? wanted : blocks - 1;
    const T* from = w + (block / blocks_per_row) * row_stride + (block % blocks_per_row) * columns;
    float scale[2] = {};
    for (int k = 0; k < groups; ++k) {
      uint32_t absmax = 0;
      for (int64_t i = lane; i < group_size; i += kLanes) {
        const float value = nf4::to_float(from[k * group_size + i]);
        absmax = nf4::larger(absmax, nf4::bits_of(value) & nf4::kMagnitudeMask);
      }
      for (int offset = kLanes / 2; offset > 0; offset /= 2)
        absmax = nf4::larger(absmax, __shfl_xor_sync(kWholeWarp, absmax, offset));
      scale[k] = nf4::scale_of(absmax);
      if (mine && lane == 0) scales[block * groups + k] = scale[k];
    }
    if (!mine) continue;
    for (int64_t j = lane; j < columns / 2; j += kLanes) {
      const float even_scale = 2 * j < group_size ? scale[0] : scale[1];
      const float odd_scale = 2 * j + 1 < group_size ? scale[0] : scale[1];
      const uint32_t even = nf4::encode(nf4::to_float(from[2 * j]), even_scale, codebook.boundary);
      const uint32_t odd = nf4::encode(nf4::to_float(from[2 * j + 1]), odd_scale, codebook.boundary);
      packed[block * (columns / 2) + j] = nf4::pack_indices(even, odd);
    }
  }
}

template <int kLanes, typename T>
cudaError_t launch_octets(const T* w, int64_t n, int64_t d, int64_t row_stride, uint8_t* packed, float* scales,
                          cudaStream_t stream) {
  constexpr int kSteps = sizeof(T) == 2 ? 4 : 2;
  constexpr int64_t kMostRows = 65535;  // of a grid; further rows, the kernel's loop takes
  const int64_t octets = d / kColumns, per_block = kThreads * kSteps;
  const dim3 grid(static_cast<unsigned>((octets + per_block - 1) / per_block),
                  static_cast<unsigned>(std::min(n, kMostRows)));
  quantize_octets<kLanes, kSteps>
      <<<grid, kThreads, 0, stream>>>(w, n, octets, row_stride, reinterpret_cast<uint32_t*>(packed), scales);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_plain(const T* w, int64_t n, int64_t d, int64_t row_stride, int64_t group_size, uint8_t* packed,
                         float* scales, cudaStream_t stream) {
  const int64_t columns = group_size % 2 == 0 ? group_size : 2 * group_size;
  const int64_t blocks_per_row = d / columns, blocks = n * blocks_per_row;
  const auto launch = [&](auto lanes) {
    constexpr int kLanes = decltype(lanes)::value;
    quantize_blocks<kLanes, T><<<grid_for(blocks, kThreads / kLanes), kThreads, 0, stream>>>(
        w, blocks, blocks_per_row, row_stride, group_size, packed, scales);
    return cudaGetLastError();
  };
  if (group_size <= 8) return launch(std::integral_constant<int, 4>{});
  if (group_size <= 32) return launch(std::integral_constant<int, 16>{});
  return launch(std::integral_constant<int, 32>{});
}

}  // namespace

template <typename T>
cudaError_t quantize(const T* w, int64_t n, int64_t d, int64_t row_stride, int64_t group_size, uint8_t* packed,
                     float* scales, cudaStream_t stream) {
  if (n == 0 || d == 0) return cudaSuccess;
  if constexpr (!std::is_same_v<T, double>) {
    const bool contiguous = row_stride == d || n == 1;
    const bool aligned = is_aligned<Vector<T>>(w) && reinterpret_cast<uintptr_t>(packed) % sizeof(uint32_t) == 0 &&
                         (contiguous || row_stride * sizeof(T) % sizeof(Vector<T>) == 0);
    if (aligned) {
      // A matrix without gaps is one long row. Rows apart take a row of blocks each, and short ones leave it half idle.
      const int64_t rows = contiguous ? 1 : n, columns = contiguous ? n * d : d;
      const auto launch = [&](auto lanes) {
        return launch_octets<decltype(lanes)::value>(w, rows, columns, row_stride, packed, scales, stream);
      };
      switch (group_size) {
        case 8:
          return launch(std::integral_constant<int, 1>{});
        case 16:
          return launch(std::integral_constant<int, 2>{});
        case 32:
          return launch(std::integral_constant<int, 4>{});
        case 64:
          return launch(std::integral_constant<int, 8>{});
        case 128:
          return launch(std::integral_constant<int, 16>{});
        case 256:
          return launch(std::integral_constant<int, 32>{});
        default:
          break;
      }
    }
  }
  return launch_plain(w, n, d, row_stride, group_size, packed, scales, stream);
}

#define SQUISH_INSTANTIATE_QUANTIZE(T) \
  template cudaError_t quantize(const T*, int64_t, int64_t, int64_t, int64_t, uint8_t*, float*, cudaStream_t)
SQUISH_INSTANTIATE_QUANTIZE(float);
SQUISH_INSTANTIATE_QUANTIZE(double);
SQUISH_INSTANTIATE_QUANTIZE(nf4::BFloat16);
SQUISH_INSTANTIATE_QUANTIZE(nf4::Float16);

}  // namespace squish::cuda
