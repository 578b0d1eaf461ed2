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
#include <bit>
#include <type_traits>

#include "csrc/cuda/device.cuh"
#include "csrc/cuda/linear.h"

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
  __trap();  // linear_small_m_takes() has said no
#endif
}

// The pair of levels of byte k of `word`, from this lane's copy of the table. `table`: its address in shared memory.
__device__ inline uint32_t levels_of(uint32_t table, uint32_t word, int k, uint32_t lane_offset) {
  const uint32_t at = __byte_perm(word, lane_offset, 0x5504u + 0x10u * k);  // byte << 8 | lane_offset
  uint32_t pair;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(table + at));
  return pair;
}

__device__ inline uint32_t word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// All 256 pairs, each once for every lane: sixteen bytes, four lanes' copies, at a time.
template <typename T>
__device__ inline void fill_table(char* table) {
  for (int i = threadIdx.x; i < 256 * 8; i += blockDim.x) {
    const int byte = i / 8;
    const uint32_t pair = pair_of<T>(codebook.level[nf4::even_index(byte)], codebook.level[nf4::odd_index(byte)]);
    *reinterpret_cast<uint4*>(table + byte * kTableStride + i % 8 * 16) = make_uint4(pair, pair, pair, pair);
  }
}

// Rows of scales in shared memory start two banks apart, so that eight of them are read without a conflict.
__host__ __device__ constexpr int scale_stride(int groups_per_row) {
  return groups_per_row + (kWarp + 2 - groups_per_row % kWarp) % kWarp;
}

// Copies that go on while the threads do; wait_for_copies() and a barrier end them.
__device__ inline void copy_float(const float* from, float* to) {
#if __CUDA_ARCH__ >= 800
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(at), "l"(from) : "memory");
#else
  __trap();  // linear_small_m_takes() has said no
#endif
}
__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

__device__ inline void stage_scales(const float* from, int rows, int groups_per_row, float* to) {
  const int stride = scale_stride(groups_per_row);
  for (int row = threadIdx.x / kWarp; row < rows; row += blockDim.x / kWarp)
    for (int i = threadIdx.x % kWarp; i < groups_per_row; i += kWarp)
      copy_float(from + int64_t{row} * groups_per_row + i, to + row * stride + i);
}

// Where an octet of x, the 16 bytes of 8 columns, lies: that of word `word` of a lane's bytes, in B's tile `tile`.
//   As x is: rows of d columns. A warp then touches two lines of every row.
//   Arranged: as the lanes read them, so that they touch as few lines as there can be (arrange() below).
template <int kParts, int kTiles, bool kArranged>
struct Octets {
  static constexpr int kActivations = 8 / kParts;  // of a tile
  static constexpr int kWord = 4 * kActivations, kTile = 4 * kWord, kChunkStride = kTiles * kTile;
  const uint4* at;

  __device__ Octets(const void* x, int d, int chunk, int activation, int t) : at(static_cast<const uint4*>(x)) {
    at += kArranged ? int64_t{chunk} * kChunkStride + activation * 4 + t
                    : int64_t{activation} * (d / 8) + chunk * (kChunk / 8) + t * (kLaneColumns / 8);
  }
  __device__ uint4 read(int d, int tile, int word) const {
    return __ldg(at + (kArranged ? tile * kTile + word * kWord : tile * kActivations * (d / 8) + word));
  }
  __device__ void to_next_chunk() { at += kArranged ? kChunkStride : kChunk / 8; }
};

// One thread an octet; activations from m on and columns from x_columns on become zeros.
template <int kParts, int kTiles, typename T>
__global__ void __launch_bounds__(kThreads) arrange(const T* __restrict__ x, int64_t x_stride, int x_columns, int m,
                                                    int64_t octets, Vector<T>* __restrict__ arranged) {
  using Order = Octets<kParts, kTiles, true>;
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= octets) return;
  const int within = static_cast<int>(i % Order::kChunkStride);
  const int chunk = static_cast<int>(i / Order::kChunkStride);
  const int tile = within / Order::kTile, word = within % Order::kTile / Order::kWord;
  const int activation = tile * Order::kActivations + within % Order::kWord / 4;
  const int column = chunk * kChunk + within % 4 * kLaneColumns + word * 8;
  Vector<T> octet = {};
  if (activation < m)
    for (int k = 0; k < 8; ++k)
      if (column + k < x_columns) octet.value[k] = x[activation * x_stride + column + k];
  arranged[i] = octet;
}

constexpr int kMostTiles = 8;             // of 8 columns of B; registers hold no more
constexpr int kMostWarps = 16;            // of a block
constexpr int kMostRows = 2 * kTileRows;  // of a block

// Tiles of 16 rows in a warp: two share what it reads of x.
constexpr int row_tiles(int tiles) { return tiles == kMostTiles ? 1 : 2; }

struct Rows {
  uint4 low, high;  // packed bytes of a lane's columns in row g and row g+8 of a tile
};

// The warps of a block, kMostWarps at most, share its rows, and each takes a stretch of the columns.
template <int kParts, int kTiles, bool kArranged, typename T>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1)
    multiply_few(const void* __restrict__ x, const uint8_t* __restrict__ packed, const float* __restrict__ scales,
                 const T* __restrict__ bias, const float* __restrict__ bias32, T* __restrict__ y, int m, int64_t n,
                 int d, int groups_per_row, int group_shift) {
  extern __shared__ __align__(16) char table[];
  using Activations = Octets<kParts, kTiles, kArranged>;
  constexpr int kActivations = Activations::kActivations, kRowTiles = row_tiles(kTiles);
  const int warps = blockDim.x / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  // The last block begins where it has rows enough, and computes some that the one before it computes, too.
  const int64_t first_row = min(blockIdx.x * int64_t{kTileRows * kRowTiles}, n - kTileRows * kRowTiles);
  const int chunks = d / kChunk;
  const int first = chunks * warp / warps, last = chunks * (warp + 1) / warps;

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
  if (first < last) load(next);  // before the tables: the memory is waited for meanwhile
  float* staged = reinterpret_cast<float*>(table + kTableBytes);
  stage_scales(scales + first_row * groups_per_row, kTileRows * kRowTiles, groups_per_row, staged);
  fill_table<T>(table);
  // Through a shuffle the compiler learns that the address is the same in all lanes, and adds it in the load for
  // nothing.
  const uint32_t table_at = __shfl_sync(kWholeWarp, static_cast<uint32_t>(__cvta_generic_to_shared(table)), 0);
  wait_for_copies();
  __syncthreads();

  // In the B operand this lane holds column g, that is activation g / kParts of every tile, if its own 32 columns of x
  // lie in part g % kParts of the chunk; else zeros. `active`: the activations from there on.
  const bool own_part = g % kParts == t * kParts / 4;
  const int active = !own_part ? 0 : kArranged ? kTiles * kActivations : m - g / kParts;
  Activations octets(x, d, first, g / kParts, t);
  // Of the result it holds columns 2t and 2t+1, and wants the scales of their parts.
  const int of_row = scale_stride(groups_per_row);
  const float* of_scale = staged + g * of_row + (kParts == 1 ? 0 : first * kParts + 2 * t % kParts);
  constexpr int kSums = kParts == 1 ? 4 : 2;  // the sums of two parts are added at once
  float sum[kRowTiles][kTiles][kSums] = {};
  for (int chunk = first; chunk < last; ++chunk) {
    Rows rows[kRowTiles];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) rows[r] = next[r];
    if (chunk + 1 < last) load(next);
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
        if (tile * kActivations < active) b = octets.read(d, tile, word);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          multiply_add<T>(product[r][tile], a[r][0], b.x, b.y);
          multiply_add<T>(product[r][tile], a[r][1], b.z, b.w);
        }
      }
    }
    octets.to_next_chunk();
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* at = of_scale + (2 * r + half) * 8 * of_row;
        float2 scale;
        if constexpr (kParts == 1) {
          scale.x = scale.y = at[chunk >> group_shift];
        } else {
          scale = *reinterpret_cast<const float2*>(at);
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const float (&of_tile)[4] = product[r][tile];
          float (&into)[kSums] = sum[r][tile];
          constexpr int kSecond = kParts == 1 ? 1 : 0;
          const int at_sum = kParts == 1 ? 2 * half : half;
          into[at_sum] = __fmaf_rn(of_tile[2 * half], scale.x, into[at_sum]);
          into[at_sum + kSecond] = __fmaf_rn(of_tile[2 * half + 1], scale.y, into[at_sum + kSecond]);
        }
      }
    }
    if constexpr (kParts > 1) of_scale += kParts;
  }

  // The warps' sums, added in the order of the columns.
  __syncthreads();  // the table is done with
  float* sums = reinterpret_cast<float*>(table);
  constexpr int kValues = kRowTiles * kTiles * kSums;
  static_assert(kMostWarps * kValues * kWarp * sizeof(float) <= kTableBytes);
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    float value = sum[v / (kTiles * kSums)][v / kSums % kTiles][v % kSums];
    if constexpr (kParts == 4) value += __shfl_xor_sync(kWholeWarp, value, 1);
    sums[(warp * kValues + v) * kWarp + lane] = value;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kValues * kWarp; i += blockDim.x) {
    const int v = i / kWarp, source = i % kWarp, r = v / (kTiles * kSums), tile = v / kSums % kTiles, s = v % kSums;
    const int half = kParts == 1 ? s / 2 : s, column = 2 * (source % 4) + (kParts == 1 ? s % 2 : 0);
    const int64_t row = first_row + r * kTileRows + half * 8 + source / 4;
    const int activation = tile * kActivations + column / kParts;
    if (activation >= m || column % kParts != 0) continue;
    float total = 0;
    for (int w = 0; w < warps; ++w) total += sums[(w * kValues + v) * kWarp + source];
    if (bias) total += nf4::to_float(bias[row]);
    if (bias32) total += bias32[row];
    y[activation * n + row] = nf4::from_float<T>(total);
  }
}

int shared_bytes(int64_t d, int64_t group_size) {
  return kTableBytes + kMostRows * scale_stride(static_cast<int>(d / group_size)) * static_cast<int>(sizeof(float));
}

template <int kParts, int kTiles, bool kArranged, typename T>
cudaError_t launch(const FewActivations<T>& call, cudaStream_t stream) {
  constexpr int kRows = kTileRows * row_tiles(kTiles);
  const int m = static_cast<int>(call.m);
  const void* x = call.x;
  if constexpr (kArranged) {
    const int64_t octets = call.d / kChunk * Octets<kParts, kTiles, true>::kChunkStride;
    const auto blocks = static_cast<unsigned>((octets + kThreads - 1) / kThreads);
    arrange<kParts, kTiles><<<blocks, kThreads, 0, stream>>>(call.x, call.x_stride, static_cast<int>(call.x_columns), m,
                                                             octets, static_cast<Vector<T>*>(call.scratch));
    x = call.scratch;
  }
  const auto kernel = multiply_few<kParts, kTiles, kArranged, T>;
  const int shared = shared_bytes(call.d, call.group_size);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>((call.n + kRows - 1) / kRows);
  const int shift = call.group_size <= kChunk ? 0 : std::countr_zero(static_cast<uint64_t>(call.group_size / kChunk));
  // Registers suffice for 16 warps of a multiprocessor: of two blocks, or of one, if there are no more blocks.
  const int warps = static_cast<int>(blocks) <= multiprocessors() ? kMostWarps : kMostWarps / 2;
  kernel<<<blocks, warps * kWarp, shared, stream>>>(x, call.packed, call.scales, call.bias, call.bias32, call.y, m,
                                                    call.n, static_cast<int>(call.d),
                                                    static_cast<int>(call.d / call.group_size), shift);
  return cudaGetLastError();
}

int parts_of(int64_t group_size) { return group_size == 32 ? 4 : group_size == 64 ? 2 : 1; }

// Tiles of 8 / kParts activations.
int tiles_for(int64_t m, int64_t group_size) {
  const int64_t tiles = (m * parts_of(group_size) + 7) / 8;
  return tiles <= 1 ? 1 : tiles <= 2 ? 2 : tiles <= 4 ? 4 : kMostTiles;
}

template <int kParts, typename T>
cudaError_t launch_for(const FewActivations<T>& call, cudaStream_t stream) {
  const int tiles = tiles_for(call.m, call.group_size);
  switch (tiles) {
    case 1:
    case 2:
      if (call.scratch) return launch<kParts, 2, true>(call, stream);
      return tiles == 1 ? launch<kParts, 1, false>(call, stream) : launch<kParts, 2, false>(call, stream);
    case 4:
      return launch<kParts, 4, true>(call, stream);
    default:
      return launch<kParts, kMostTiles, true>(call, stream);
  }
}

}  // namespace

int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

bool linear_small_m_takes(int64_t m, int64_t n, int64_t d, int64_t group_size) {
  const bool is_power_of_two = (group_size & (group_size - 1)) == 0;
  if (!is_power_of_two || group_size < kLaneColumns || d == 0 || d % kChunk != 0 || d >= int64_t{1} << 24) return false;
  // More activations would read the weight twice, and cuBLAS on a decoded weight is faster than that.
  if (m * parts_of(group_size) > 8 * kMostTiles || n < kMostRows) return false;
  int device = 0, major = 0, shared = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return false;
  return major >= 8 && shared >= shared_bytes(d, group_size);
}

bool linear_small_m_reads_x(int64_t m, int64_t group_size) { return tiles_for(m, group_size) <= 2; }

int64_t linear_small_m_scratch(int64_t m, int64_t d, int64_t group_size) {
  return std::max(tiles_for(m, group_size), 2) * 8 / parts_of(group_size) * d;
}

template <typename T>
cudaError_t linear_small_m(const FewActivations<T>& call, cudaStream_t stream) {
  switch (parts_of(call.group_size)) {
    case 4:
      return launch_for<4>(call, stream);
    case 2:
      return launch_for<2>(call, stream);
    default:
      return launch_for<1>(call, stream);
  }
}

template cudaError_t linear_small_m(const FewActivations<nf4::BFloat16>&, cudaStream_t);
template cudaError_t linear_small_m(const FewActivations<nf4::Float16>&, cudaStream_t);

}  // namespace squish::cuda
