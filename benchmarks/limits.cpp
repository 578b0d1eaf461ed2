// What the machine's memory allows: loops that read or write as many bytes as an operator does, and do nothing else.
// They run on torch's threads, as the operators do. benchmarks/limits.py compiles and calls them.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kStreams = 8;    // one thread that reads in eight places is faster than in one
constexpr int64_t kLine = 64;  // bytes that one step of a stream moves
volatile uint64_t sink;        // what is read has to be used

// The bytes [first, last) of each of the streams of one thread.
struct Streams {
  int64_t begin, length;  // stream s: [begin + s * length, begin + (s + 1) * length), in bytes, whole lines
};

Streams streams_of(int64_t bytes, int64_t thread, int64_t threads) {
  const int64_t length = bytes / (threads * kStreams) / kLine * kLine;
  return {thread * kStreams * length, length};
}

// How many lines are written for so many that are read; 0 reads nothing.
struct Lines {
  int64_t read, written;
};

// A loop for one thread, which writes the streams. in: of the length that Lines says.
using Read = uint64_t (*)(const uint8_t* in, Streams);
using Write = void (*)(const uint8_t* in, Lines, uint8_t* out, Streams);

// One vector type each: a line is loaded, mixed into a sum, and stored with or without passing through the caches.
// What is stored is not zero: some processors write a line of zeros to memory in half the time of any other.
constexpr int64_t kOnes = 0x0101010101010101;

struct Plain {
  struct Line {
    int64_t words[8];
  };
  static Line start() { return {{kOnes, kOnes, kOnes, kOnes, kOnes, kOnes, kOnes, kOnes}}; }
  static void add(Line& sum, const uint8_t* in) {
    Line line;
    std::memcpy(&line, in, sizeof line);
    for (int i = 0; i < 8; ++i) sum.words[i] ^= line.words[i];
  }
  static void store(uint8_t* out, const Line& line) { std::memcpy(out, &line, sizeof line); }
  static void stream(uint8_t* out, const Line& line) { store(out, line); }
  static uint64_t fold(const Line& line) { return static_cast<uint64_t>(line.words[0] ^ line.words[7]); }
};

#define SQUISH_LOOPS(TARGET, NAME, V)                                                                          \
  TARGET uint64_t NAME##_read(const uint8_t* in, Streams s) {                                                  \
    typename V::Line sums[kStreams];                                                                           \
    for (auto& sum : sums) sum = V::start();                                                                   \
    const uint8_t* first = in + s.begin;                                                                       \
    for (int64_t at = 0; at < s.length; at += kLine)                                                           \
      for (int stream = 0; stream < kStreams; ++stream) V::add(sums[stream], first + stream * s.length + at);  \
    uint64_t all = 0;                                                                                          \
    for (auto& sum : sums) all ^= V::fold(sum);                                                                \
    return all;                                                                                                \
  }                                                                                                            \
  template <bool kStreaming>                                                                                   \
  TARGET void NAME##_write(const uint8_t* in, Lines lines, uint8_t* out, Streams s) {                          \
    const int streams = lines.read == 0 ? 1 : kStreams; /* stores alone are fastest in one sequence */         \
    const int64_t block = lines.written * kLine;                                                               \
    const int64_t length = s.length * kStreams / streams / block * block;                                      \
    for (int64_t at = 0; at < length; at += block)                                                             \
      for (int stream = 0; stream < streams; ++stream) {                                                       \
        const int64_t place = s.begin + stream * length + at;                                                  \
        const uint8_t* from = in + place / lines.written * lines.read;                                         \
        auto sum = V::start();                                                                                 \
        for (int64_t line = 0; line < lines.read; ++line) V::add(sum, from + line * kLine);                    \
        for (int64_t line = 0; line < lines.written; ++line)                                                   \
          kStreaming ? V::stream(out + place + line * kLine, sum) : V::store(out + place + line * kLine, sum); \
      }                                                                                                        \
  }

SQUISH_LOOPS(, plain, Plain)

#if defined(__x86_64__)
#define SQUISH_AVX2 __attribute__((target("avx2")))
#define SQUISH_AVX512 __attribute__((target("avx512f")))
#define SQUISH_INLINE static inline __attribute__((always_inline))

struct Avx2 {
  struct Line {
    __m256i low, high;
  };
  SQUISH_AVX2 SQUISH_INLINE Line start() { return {_mm256_set1_epi64x(kOnes), _mm256_set1_epi64x(kOnes)}; }
  SQUISH_AVX2 SQUISH_INLINE void add(Line& sum, const uint8_t* in) {
    const __m256i* line = reinterpret_cast<const __m256i*>(in);
    sum.low = _mm256_xor_si256(sum.low, _mm256_loadu_si256(line));
    sum.high = _mm256_xor_si256(sum.high, _mm256_loadu_si256(line + 1));
  }
  SQUISH_AVX2 SQUISH_INLINE void store(uint8_t* out, const Line& line) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), line.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + 1, line.high);
  }
  SQUISH_AVX2 SQUISH_INLINE void stream(uint8_t* out, const Line& line) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out), line.low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out) + 1, line.high);
  }
  SQUISH_AVX2 SQUISH_INLINE uint64_t fold(const Line& line) {
    return static_cast<uint64_t>(_mm256_extract_epi64(_mm256_xor_si256(line.low, line.high), 0));
  }
};

struct Avx512 {
  using Line = __m512i;
  SQUISH_AVX512 SQUISH_INLINE Line start() { return _mm512_set1_epi64(kOnes); }
  SQUISH_AVX512 SQUISH_INLINE void add(Line& sum, const uint8_t* in) {
    sum = _mm512_xor_si512(sum, _mm512_loadu_si512(in));
  }
  SQUISH_AVX512 SQUISH_INLINE void store(uint8_t* out, const Line& line) { _mm512_storeu_si512(out, line); }
  SQUISH_AVX512 SQUISH_INLINE void stream(uint8_t* out, const Line& line) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), line);
  }
  SQUISH_AVX512 SQUISH_INLINE uint64_t fold(const Line& line) {
    return static_cast<uint64_t>(_mm512_reduce_add_epi64(line));
  }
};

SQUISH_LOOPS(SQUISH_AVX2, avx2, Avx2)
SQUISH_LOOPS(SQUISH_AVX512, avx512, Avx512)
#endif

struct Loops {
  const char* name;
  Read read;
  Write store, stream;
};

const Loops& loops() {
  static const Loops best = [] {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return Loops{"avx512", avx512_read, avx512_write<false>, avx512_write<true>};
    if (__builtin_cpu_supports("avx2")) return Loops{"avx2", avx2_read, avx2_write<false>, avx2_write<true>};
#endif
    return Loops{"plain", plain_read, plain_write<false>, plain_write<true>};
  }();
  return best;
}

// Calls f(thread) on each of torch's threads, or f(0) here if one is wanted.
template <typename F>
void on_threads(int64_t threads, const F& f) {
  const auto call = [](int64_t first, int64_t last, void* context) {
    for (int64_t thread = first; thread < last; ++thread) (*static_cast<const F*>(context))(thread);
  };
  torch_parallel_for(0, threads, 1, call, const_cast<F*>(&f));
}

}  // namespace

extern "C" {

const char* squish_limits_isa() { return loops().name; }

// Reads both arrays once.
void squish_limits_read(const uint8_t* a, int64_t a_bytes, const uint8_t* b, int64_t b_bytes, int64_t threads) {
  on_threads(threads, [=](int64_t thread) {
    sink =
        loops().read(a, streams_of(a_bytes, thread, threads)) ^ loops().read(b, streams_of(b_bytes, thread, threads));
  });
}

// Reads `in` once, if there is one, and writes `out` once; the larger has a multiple of the other's bytes. streaming:
// past the caches, for which out has to be 64-byte aligned.
void squish_limits_write(const uint8_t* in, int64_t in_bytes, uint8_t* out, int64_t out_bytes, int64_t streaming,
                         int64_t threads) {
  const Lines lines = in == nullptr          ? Lines{0, 1}
                      : in_bytes < out_bytes ? Lines{1, out_bytes / in_bytes}
                                             : Lines{in_bytes / out_bytes, 1};
  on_threads(threads, [=](int64_t thread) {
    (streaming ? loops().stream : loops().store)(in, lines, out, streams_of(out_bytes, thread, threads));
#if defined(__x86_64__)
    _mm_sfence();
#endif
  });
}

}  // extern "C"
