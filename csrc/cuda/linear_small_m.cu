// The linear layer for a few activations, on the packed weight itself: tensor cores multiply the levels, and the scales
// come to the sums in float32. What limits it is shared memory and the L1 cache, so each is touched as little as can
// be.
//
// A warp takes 16 rows of the weight (times kRowTiles) and 128 columns at a time: a chunk. Lane (g, t) = (lane / 4,
// lane % 4) loads the 16 packed bytes of columns 32t to 32t+31 in rows g and g+8, which is how the A operand of
// mma.m16n8k16 wants its rows; the columns come in another order than in memory, and those of x, the B operand, in the
// same one. A byte becomes a pair of levels by one look-up in a table in shared memory of which every lane has its own
// copy, 256 bytes apart, so that one byte permutation makes the address and no two lanes want one bank.
//
// A chunk holds kParts groups, and a sum must not run across them. The B operand has 8 columns, and column c is
// activation c / kParts with zeros outside of the chunk's group c % kParts: so the sums of different groups come out in
// different columns, and are scaled and added in float32.
#include <type_traits>

#include "csrc/cuda/device.cuh"
#include "csrc/cuda/kernels.h"

namespace squish::cuda {
namespace {

__constant__ nf4::Codebook codebook = nf4::kCodebook;  // a copy made by the compiler, not by a person

constexpr int kChunk = 128;       // columns
constexpr int kLaneColumns = 32;  // of a chunk, in one lane
constexpr int kTileRows = 16;
constexpr int kTableStride = 256;
constexpr int kTableBytes = 256 * kTableStride;

// Two values of a 16-bit type in a register, the first in its low half.
template <typename T>
__device__ inline uint32_t pair_of(float even, float odd) {
  return uint32_t{nf4::from_float<T>(even).bits} | uint32_t{nf4::from_float<T>(odd).bits} << 16;
}

// sum += a b, for 16 x 16 of a and 16 x 8 of b.
template <typename T>
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, nf4::BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  __trap();  // linear_few_takes() has said no
#endif
}

// The pair of levels of byte k of `word`, from this lane's copy of the table. `table`: its address in shared memory.
__device__ inline uint32_t levels_of(uint32_t table, uint32_t word, int k, uint32_t lane_offset) {
  const uint32_t at = __byte_perm(word, lane_offset, 0x5504u | k << 4);  // byte << 8 | lane_offset
  uint32_t pair;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(table + at));
  return pair;
}

__device__ inline uint32_t word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

template <typename T>
__device__ inline void fill_table(char* table) {
  for (int i = threadIdx.x; i < 256 * 8; i += blockDim.x) {  // sixteen bytes each: four lanes' copies
    const int byte = i / 8;
    const uint32_t pair = pair_of<T>(codebook.level[nf4::even_index(byte)], codebook.level[nf4::odd_index(byte)]);
    *reinterpret_cast<uint4*>(table + byte * kTableStride + i % 8 * 16) = make_uint4(pair, pair, pair, pair);
  }
}

struct Rows {
  uint4 low, high;  // packed bytes of a lane's columns in row g and row g+8 of a tile
};

// kWarps: of a block; they share its rows, and each takes a stretch of the columns. kBlocks: of a multiprocessor.
template <int kParts, int kTiles, int kRowTiles, int kWarps, int kBlocks, typename T>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks)
    multiply_few(const T* __restrict__ x, const uint8_t* __restrict__ packed, const float* __restrict__ scales,
                 const T* __restrict__ bias, const float* __restrict__ bias32, T* __restrict__ y, int m, int64_t n,
                 int d, int groups_per_row, int group_shift) {
  extern __shared__ __align__(16) char table[];
  constexpr int kActivations = 8 / kParts;  // of a tile of the B operand
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int64_t first_row = min(blockIdx.x * int64_t{kTileRows * kRowTiles}, n - kTileRows * kRowTiles);
  const int chunks = d / kChunk;
  const int first = chunks * warp / kWarps, last = chunks * (warp + 1) / kWarps;

  // Row g of each tile; row g+8 is 8 rows on.
  const uint8_t* from = packed + (first_row + g) * (d / 2) + first * (kChunk / 2) + t * (kLaneColumns / 2);
  const int eight_rows = 8 * (d / 2);
  const auto load = [&](Rows(&rows)[kRowTiles]) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      rows[r].low = __ldcs(reinterpret_cast<const uint4*>(from + (2 * r) * eight_rows));
      rows[r].high = __ldcs(reinterpret_cast<const uint4*>(from + (2 * r + 1) * eight_rows));
    }
    from += kChunk / 2;
  };
  Rows next[kRowTiles] = {};
  if (first < last) load(next);  // before the table: the memory is waited for meanwhile
  fill_table<T>(table);
  // Through a shuffle the compiler learns that the address is the same in all lanes, and adds it in the load for
  // nothing.
  const uint32_t table_at = __shfl_sync(kWholeWarp, static_cast<uint32_t>(__cvta_generic_to_shared(table)), 0);
  __syncthreads();

  // In the B operand this lane holds column g, that is activation g / kParts of every tile, if its own 32 columns of x
  // lie in part g % kParts of the chunk; else zeros. `active`: the activations from there on.
  const int active = g % kParts == t * kParts / 4 ? m - g / kParts : 0;
  const uint4* of_x = reinterpret_cast<const uint4*>(x + int64_t{g / kParts} * d + first * kChunk + t * kLaneColumns);
  // Of the result it holds columns 2t and 2t+1, and wants the scales of their parts.
  const float* of_scale =
      scales + (first_row + g) * groups_per_row + (kParts == 1 ? 0 : first * kParts + 2 * t % kParts);
  constexpr int kSums = kParts == 1 ? 4 : 2;  // the sums of two parts are added at once
  float sum[kRowTiles][kTiles][kSums] = {};
  for (int chunk = first; chunk < last; ++chunk) {
    Rows rows[kRowTiles];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) rows[r] = next[r];
    if (chunk + 1 < last) load(next);
    float scale[kRowTiles][2][2];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* at = of_scale + (2 * r + half) * 8 * groups_per_row;
        if constexpr (kParts == 1) {
          scale[r][half][0] = scale[r][half][1] = __ldg(at + (chunk >> group_shift));
        } else {
          const float2 two = __ldg(reinterpret_cast<const float2*>(at));
          scale[r][half][0] = two.x, scale[r][half][1] = two.y;
        }
      }
    }
    if constexpr (kParts > 1) of_scale += kParts;
    float product[kRowTiles][kTiles][4] = {};
#pragma unroll
    for (int word = 0; word < 4; ++word) {  // of a lane's 16 bytes: two steps of 16 columns
      uint32_t a[kRowTiles][2][4];          // of a step: two pairs of row g and two of row g+8, in turn
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          a[r][k / 2][k % 2 * 2] = levels_of(table_at, word_of(rows[r].low, word), k, 4 * lane);
          a[r][k / 2][k % 2 * 2 + 1] = levels_of(table_at, word_of(rows[r].high, word), k, 4 * lane);
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        uint4 b = {};
        if (tile * kActivations < active) b = __ldg(of_x + tile * kActivations * (d / 8) + word);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          multiply_add<T>(product[r][tile], a[r][0], b.x, b.y);
          multiply_add<T>(product[r][tile], a[r][1], b.z, b.w);
        }
      }
    }
    of_x += kChunk / 8;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          float& into = sum[r][tile][kParts == 1 ? k : k / 2];
          into = __fmaf_rn(product[r][tile][k], scale[r][k / 2][k % 2], into);
        }
      }
    }
  }

  // The warps' sums, added in the order of the columns.
  __syncthreads();  // the table is done with
  float* sums = reinterpret_cast<float*>(table);
  constexpr int kValues = kRowTiles * kTiles * kSums;
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    float value = sum[v / (kTiles * kSums)][v / kSums % kTiles][v % kSums];
    if constexpr (kParts == 4) value += __shfl_xor_sync(kWholeWarp, value, 1);
    sums[(warp * kValues + v) * kWarp + lane] = value;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kValues * kWarp; i += kWarps * kWarp) {
    const int v = i / kWarp, source = i % kWarp, r = v / (kTiles * kSums), tile = v / kSums % kTiles, s = v % kSums;
    const int half = kParts == 1 ? s / 2 : s, column = 2 * (source % 4) + (kParts == 1 ? s % 2 : 0);
    const int64_t row = first_row + r * kTileRows + half * 8 + source / 4;
    const int activation = tile * kActivations + column / kParts;
    if (activation >= m || column % kParts != 0) continue;
    float total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sums[(w * kValues + v) * kWarp + source];
    if (bias) total += nf4::to_float(bias[row]);
    if (bias32) total += bias32[row];
    y[activation * n + row] = nf4::from_float<T>(total);
  }
}

template <int kParts, int kTiles, int kRowTiles, int kWarps, int kBlocks, typename T>
cudaError_t launch(int64_t m, const T* x, const uint8_t* packed, const float* scales, const T* bias,
                   const float* bias32, T* y, int64_t n, int64_t d, int64_t group_size, cudaStream_t stream) {
  const auto kernel = multiply_few<kParts, kTiles, kRowTiles, kWarps, kBlocks, T>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kTableBytes);
  if (error != cudaSuccess) return error;
  constexpr int kRows = kTileRows * kRowTiles;
  kernel<<<static_cast<unsigned>((n + kRows - 1) / kRows), kWarps * kWarp, kTableBytes, stream>>>(
      x, packed, scales, bias, bias32, y, static_cast<int>(m), n, static_cast<int>(d), static_cast<int>(d / group_size),
      group_size <= kChunk ? 0 : std::countr_zero(static_cast<uint64_t>(group_size / kChunk)));
  return cudaGetLastError();
}

template <int kParts, typename T, typename... Arguments>
cudaError_t launch_for(int64_t m, Arguments... arguments) {
  constexpr int kActivations = 8 / kParts;
  if (m <= kActivations) return launch<kParts, 1, 1, 16, 2, T>(m, arguments...);
  if (m <= 2 * kActivations) return launch<kParts, 2, 1, 16, 2, T>(m, arguments...);
  if (m <= 4 * kActivations) return launch<kParts, 4, 1, 16, 1, T>(m, arguments...);
  return launch<kParts, 8, 1, 16, 1, T>(m, arguments...);
}

}  // namespace

bool linear_few_takes(int64_t m, int64_t n, int64_t d, int64_t group_size) {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess || major < 8)
    return false;
  const bool is_power_of_two = (group_size & (group_size - 1)) == 0;
  return is_power_of_two && group_size >= kLaneColumns && m <= 64 * std::min<int64_t>(group_size, kChunk) / kChunk &&
         d % kChunk == 0 && d > 0 && n >= 2 * kTileRows && d < (int64_t{1} << 24);
}

template <typename T>
cudaError_t linear_few(const T* x, const uint8_t* packed, const float* scales, const T* bias, const float* bias32, T* y,
                       int64_t m, int64_t n, int64_t d, int64_t group_size, cudaStream_t stream) {
  if (group_size == 32) return launch_for<4, T>(m, x, packed, scales, bias, bias32, y, n, d, group_size, stream);
  if (group_size == 64) return launch_for<2, T>(m, x, packed, scales, bias, bias32, y, n, d, group_size, stream);
  return launch_for<1, T>(m, x, packed, scales, bias, bias32, y, n, d, group_size, stream);
}

#define SQUISH_INSTANTIATE_LINEAR(T)                                                                           \
  template cudaError_t linear_few(const T*, const uint8_t*, const float*, const T*, const float*, T*, int64_t, \
                                  int64_t, int64_t, int64_t, cudaStream_t)
SQUISH_INSTANTIATE_LINEAR(nf4::BFloat16);
SQUISH_INSTANTIATE_LINEAR(nf4::Float16);

}  // namespace squish::cuda
