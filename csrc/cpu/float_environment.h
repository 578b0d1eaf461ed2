// The floating-point environment that the kernels promise their bits for: round to nearest, subnormals kept.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace squish::cpu {

// Sets the default environment for this thread and restores the caller's on leaving: a process may have asked for
// flush-to-zero (torch.set_flush_denormal) or another rounding. Kernels are called through pointers inside the scope,
// which keeps the compiler from moving their arithmetic out of it.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() : saved_(read()) { write(kDefault); }
  ~DefaultFloatEnvironment() { write(saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
#if defined(__x86_64__)
  using Register = uint32_t;
  static constexpr Register kDefault = 0x1f80;  // MXCSR: all exceptions masked, nearest, FTZ and DAZ off
  static Register read() { return _mm_getcsr(); }
  static void write(Register value) { _mm_setcsr(value); }
#elif defined(__aarch64__)
  using Register = uint64_t;
  static constexpr Register kDefault = 0;  // FPCR
  static Register read() {
    Register value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void write(Register value) { asm volatile("msr fpcr, %0" : : "r"(value)); }
#else
  using Register = int;  // no flush mode is known here
  static constexpr Register kDefault = 0;
  static Register read() { return 0; }
  static void write(Register) {}
#endif
  Register saved_;
};

}  // namespace squish::cpu
