#include "csrc/cuda/kernels.h"

#include <algorithm>

#include "csrc/nf4/codec.h"

namespace squish::cuda {
namespace {

__constant__ nf4::Codebook codebook = nf4::kCodebook;  // a copy made by the compiler, not by a person

constexpr int kThreads = 256;
constexpr unsigned kWholeWarp = 0xffffffffu;

// Constant memory serves one address per warp at a time; sixteen levels looked up by data need shared memory.
struct SharedCodebook {
  float level[nf4::kLevelCount];
};
__device__ inline void stage_levels(SharedCodebook& shared) {
  if (threadIdx.x < nf4::kLevelCount) shared.level[threadIdx.x] = codebook.level[threadIdx.x];
  __syncthreads();
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
    float scale[2];
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

template <typename T, int kValues>
struct alignas(sizeof(T) * kValues) Vector {
  T value[kValues];
};

// A thread decodes kBytes packed bytes, reads them as one vector and stores their columns as vectors of kStore. With
// more than one byte, all are of one group. The pointers are aligned to these vectors.
template <int kBytes, int kStore, typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_bytes(const Vector<uint8_t, kBytes>* __restrict__ packed, const float* __restrict__ scales,
                     int64_t vectors, int64_t group_size, Vector<T, kStore>* __restrict__ out) {
  __shared__ SharedCodebook shared;
  stage_levels(shared);
  constexpr int kStores = 2 * kBytes / kStore;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t v = blockIdx.x * int64_t{kThreads} + threadIdx.x; v < vectors; v += step) {
    const Vector<uint8_t, kBytes> bytes = packed[v];
    const int64_t column = v * (2 * kBytes);
    const float even_scale = scales[column / group_size];
    const float odd_scale = kBytes == 1 ? scales[(column + 1) / group_size] : even_scale;  // differ if it is odd
    T values[2 * kBytes];
#pragma unroll
    for (int b = 0; b < kBytes; ++b) {
      values[2 * b] = nf4::decode<T>(nf4::even_index(bytes.value[b]), even_scale, shared.level);
      values[2 * b + 1] = nf4::decode<T>(nf4::odd_index(bytes.value[b]), odd_scale, shared.level);
    }
#pragma unroll
    for (int s = 0; s < kStores; ++s) {
      Vector<T, kStore> store;
#pragma unroll
      for (int i = 0; i < kStore; ++i) store.value[i] = values[s * kStore + i];
      out[v * kStores + s] = store;
    }
  }
}

// Enough blocks to fill any GPU; what is left over, the kernels' loops take.
unsigned grid_for(int64_t work, int64_t per_block) {
  constexpr int64_t kMostBlocks = int64_t{1} << 20;
  return static_cast<unsigned>(std::min((work + per_block - 1) / per_block, kMostBlocks));
}

template <typename T>
bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(T) == 0;
}

template <int kBytes, int kStore, typename T>
cudaError_t launch_dequantize(const uint8_t* packed, const float* scales, int64_t count, int64_t group_size, T* out,
                              cudaStream_t stream) {
  const int64_t vectors = count / (2 * kBytes);
  dequantize_bytes<kBytes, kStore, T><<<grid_for(vectors, kThreads), kThreads, 0, stream>>>(
      reinterpret_cast<const Vector<uint8_t, kBytes>*>(packed), scales, vectors, group_size,
      reinterpret_cast<Vector<T, kStore>*>(out));
  return cudaGetLastError();
}

}  // namespace

template <typename T>
cudaError_t quantize(const T* w, int64_t n, int64_t d, int64_t row_stride, int64_t group_size, uint8_t* packed,
                     float* scales, cudaStream_t stream) {
  const int64_t columns = group_size % 2 == 0 ? group_size : 2 * group_size;
  const int64_t blocks_per_row = d / columns, blocks = n * blocks_per_row;
  if (blocks == 0) return cudaSuccess;
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

template <typename T>
cudaError_t dequantize(const uint8_t* packed, const float* scales, int64_t count, int64_t group_size, T* out,
                       cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  // `out` may be a view that starts anywhere in a tensor of the caller's, so its alignment is looked at.
  constexpr int kWide = 4;                                  // packed bytes a thread
  constexpr int kStore = 16 / static_cast<int>(sizeof(T));  // columns a store: 16 bytes
  if (group_size % (2 * kWide) == 0 && is_aligned<Vector<uint8_t, kWide>>(packed) && is_aligned<Vector<T, kStore>>(out))
    return launch_dequantize<kWide, kStore>(packed, scales, count, group_size, out, stream);
  if (is_aligned<Vector<T, 2>>(out)) return launch_dequantize<1, 2>(packed, scales, count, group_size, out, stream);
  return launch_dequantize<1, 1>(packed, scales, count, group_size, out, stream);
}

#define SQUISH_INSTANTIATE_QUANTIZE(T) \
  template cudaError_t quantize(const T*, int64_t, int64_t, int64_t, int64_t, uint8_t*, float*, cudaStream_t)
SQUISH_INSTANTIATE_QUANTIZE(float);
SQUISH_INSTANTIATE_QUANTIZE(double);
SQUISH_INSTANTIATE_QUANTIZE(nf4::BFloat16);
SQUISH_INSTANTIATE_QUANTIZE(nf4::Float16);

#define SQUISH_INSTANTIATE_DEQUANTIZE(T) \
  template cudaError_t dequantize(const uint8_t*, const float*, int64_t, int64_t, T*, cudaStream_t)
SQUISH_INSTANTIATE_DEQUANTIZE(float);
SQUISH_INSTANTIATE_DEQUANTIZE(nf4::BFloat16);
SQUISH_INSTANTIATE_DEQUANTIZE(nf4::Float16);

}  // namespace squish::cuda
