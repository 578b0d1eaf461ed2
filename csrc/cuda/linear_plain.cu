// The linear layer for very few activations, without tensor cores: any type of x, any group size, any shape and
// alignment. In float32 throughout, so that float32 stays as exact as on the CPU.
//
// A warp takes some rows of the weight, and its lanes neighbouring words of eight columns (or bytes of two, where
// groups or addresses do not fit words). The block's share of x lies in shared memory as float32. A byte becomes a pair
// of levels by one look-up in a table there, of which every lane of a half warp has a copy of its own: no bank
// conflicts.
#include "csrc/cuda/device.cuh"
#include "csrc/cuda/linear.h"

namespace squish::cuda {
namespace {

__constant__ nf4::Codebook codebook = nf4::kCodebook;  // a copy made by the compiler, not by a person

constexpr int kWarps = 8;  // of a block
constexpr int kRows = 4;   // of a warp
constexpr int kBlockRows = kWarps * kRows;
constexpr int kStretch = 512;  // columns of x in shared memory at a time
constexpr int kWordColumns = 8;
constexpr int kWords = kStretch / kWordColumns / kWarp;  // of a lane and a row in a stretch
constexpr int kCopies = 16;  // of the table: a warp reads eight bytes a lane in two turns, half a warp each

struct alignas(8) LevelPair {
  float even, odd;
};

// Where column c of a stretch lies in shared memory: the first halves of all words, then the second ones, so that
// neighbouring lanes read neighbouring sixteen bytes.
__device__ inline int place_of(int c) { return c % 8 / 4 * (kStretch / 2) + c / 8 * 4 + c % 4; }

// The levels of byte k of `word`, from the copy of the table that lies at `lane_offset`. A byte's copies lie side by
// side.
__device__ inline LevelPair pair_of(const LevelPair* table, uint32_t word, int k, uint32_t lane_offset) {
  constexpr int kShift = 7;
  static_assert(kCopies * sizeof(LevelPair) == 1 << kShift);
  const uint32_t moved = k == 0 ? word << kShift : word >> (8 * k - kShift);
  const uint32_t at = (moved & 0xff << kShift) | lane_offset;
  return *reinterpret_cast<const LevelPair*>(reinterpret_cast<const char*>(table) + at);
}

template <typename T>
__device__ inline void store_sum(const FewActivations<T>& call, int64_t activation, int64_t row, float sum) {
  if (call.bias) sum += nf4::to_float(call.bias[row]);
  if (call.bias32) sum += call.bias32[row];
  call.y[activation * call.n + row] = nf4::from_float<T>(sum);
}

// A block takes kM activations, of which the last may be missing. kByWords: groups are whole words, which are aligned.
template <int kM, bool kByWords, typename T>
__global__ void __launch_bounds__(kWarps* kWarp) multiply_plain(FewActivations<T> call) {
  __shared__ LevelPair table[256 * kCopies];
  __shared__ float4 staged[kM * kStretch / 4];
  float* of_x = reinterpret_cast<float*>(staged);
  for (int i = threadIdx.x; i < 256 * kCopies; i += blockDim.x) {
    const int byte = i / kCopies;
    table[i] = {codebook.level[nf4::even_index(byte)], codebook.level[nf4::odd_index(byte)]};
  }
  const int64_t first_activation = blockIdx.y * int64_t{kM};
  const int activations = static_cast<int>(min(call.m - first_activation, int64_t{kM}));
  const T* x_rows = call.x + first_activation * call.x_stride;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t lane_offset = lane % kCopies * sizeof(LevelPair);
  const int64_t block_row = blockIdx.x * int64_t{kBlockRows};
  const int d = static_cast<int>(call.d);
  const unsigned group_size = static_cast<unsigned>(min(call.group_size, max(call.d, int64_t{1}))), row_bytes = d / 2,
                 row_groups = d / group_size;
  const int last_row = static_cast<int>(min(call.n - block_row, int64_t{kBlockRows})) - 1;
  const uint8_t* packed = call.packed + block_row * row_bytes;
  const float* scales = call.scales + block_row * row_groups;
  unsigned packed_at[kRows], scales_at[kRows];  // the beginning of each row
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = min(warp * kRows + r, last_row);  // rows past the end work on the last one, and do not store
    packed_at[r] = row * row_bytes;
    scales_at[r] = row * row_groups;
  }

  float sum[kRows][kM] = {};
  for (int first = 0; first < d; first += kStretch) {
    __syncthreads();  // the stretch before is done with
    for (int i = threadIdx.x; i < kM * kStretch; i += blockDim.x) {
      const int activation = i / kStretch, c = i % kStretch;
      const bool is_there = activation < activations && first + c < call.x_columns;
      of_x[activation * kStretch + place_of(c)] =
          is_there ? nf4::to_float(x_rows[activation * call.x_stride + first + c]) : 0.0f;
    }
    __syncthreads();
    const int columns = min(d - first, kStretch);
    if constexpr (kByWords) {
      uint32_t word[kWords][kRows] = {};
      float scale[kWords][kRows] = {};
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int c = (w * kWarp + lane) * kWordColumns;
        if (c >= columns) continue;
        const unsigned group = static_cast<unsigned>(first + c) / group_size;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          word[w][r] = __ldcs(reinterpret_cast<const uint32_t*>(packed + (packed_at[r] + c / 2)));
          scale[w][r] = __ldg(scales + (scales_at[r] + group));
        }
      }
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float4 x[kM];
#pragma unroll
          for (int a = 0; a < kM; ++a) x[a] = staged[(a * kStretch + half * (kStretch / 2)) / 4 + w * kWarp + lane];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {  // past the columns the scale is zero, and so is x
            const LevelPair low = pair_of(table, word[w][r], 2 * half, lane_offset);
            const LevelPair high = pair_of(table, word[w][r], 2 * half + 1, lane_offset);
            const float weight[] = {low.even * scale[w][r], low.odd * scale[w][r], high.even * scale[w][r],
                                    high.odd * scale[w][r]};
#pragma unroll
            for (int a = 0; a < kM; ++a) {
              sum[r][a] = __fmaf_rn(weight[0], x[a].x, sum[r][a]);
              sum[r][a] = __fmaf_rn(weight[1], x[a].y, sum[r][a]);
              sum[r][a] = __fmaf_rn(weight[2], x[a].z, sum[r][a]);
              sum[r][a] = __fmaf_rn(weight[3], x[a].w, sum[r][a]);
            }
          }
        }
      }
    } else {
      for (int c = 2 * lane; c < columns; c += 2 * kWarp) {
        const unsigned column = static_cast<unsigned>(first + c);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const LevelPair pair = pair_of(table, packed[packed_at[r] + c / 2], 0, lane_offset);
          const float even = pair.even * scales[scales_at[r] + column / group_size];
          const float odd = pair.odd * scales[scales_at[r] + (column + 1) / group_size];
#pragma unroll
          for (int a = 0; a < kM; ++a) {
            const float* x = of_x + a * kStretch + place_of(c);
            sum[r][a] = __fmaf_rn(odd, x[1], __fmaf_rn(even, x[0], sum[r][a]));
          }
        }
      }
    }
    packed += kStretch / 2;
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int a = 0; a < kM; ++a) {
      float total = sum[r][a];
      for (int offset = kWarp / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(kWholeWarp, total, offset);
      const int row = warp * kRows + r;
      if (lane == 0 && a < activations && row <= last_row)
        store_sum(call, first_activation + a, block_row + row, total);
    }
  }
}

template <int kM, typename T>
cudaError_t launch(const FewActivations<T>& call, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>((call.n + kBlockRows - 1) / kBlockRows),
                    static_cast<unsigned>((call.m + kM - 1) / kM));
  const bool by_words = call.group_size % kWordColumns == 0 && is_aligned<uint32_t>(call.packed);
  const auto kernel = by_words ? multiply_plain<kM, true, T> : multiply_plain<kM, false, T>;
  kernel<<<blocks, kWarps * kWarp, 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace

template <typename T>
cudaError_t linear_plain(const FewActivations<T>& call, cudaStream_t stream) {
  if (call.m <= 1) return launch<1>(call, stream);
  if (call.m <= 2) return launch<2>(call, stream);
  if (call.m <= 4) return launch<4>(call, stream);
  return launch<8>(call, stream);  // and 8 more, and 8 more: registers hold no more at once
}

template cudaError_t linear_plain(const FewActivations<float>&, cudaStream_t);
template cudaError_t linear_plain(const FewActivations<nf4::BFloat16>&, cudaStream_t);
template cudaError_t linear_plain(const FewActivations<nf4::Float16>&, cudaStream_t);

}  // namespace squish::cuda
