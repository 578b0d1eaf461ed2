/* NF4 in plain C: the kernels of squish_nf4 without torch, for programs in C and for other languages' bindings.
 *
 * A matrix has n rows of d columns, row after row without gaps. Every group of group_size neighbouring columns of a row
 * shares a scale. Encoded it is
 *   packed: n * d/2 bytes; column 2j is the low nibble of byte j of its row, column 2j+1 the high one
 *   scales: n * d/group_size floats; the largest magnitude of the group, 1 if it is all zero
 * and decodes to level[nibble] * scale. The bytes are those of the PyTorch operators on every processor.
 *
 * The functions are pure: they do not allocate, lock, throw, print or start threads, and may be called from any thread.
 * A range of rows, [first_row, last_row), lets the caller's threads share a matrix; pointers are always those of the
 * whole matrix. Values must lie as C wants them: a matrix of float64 on a multiple of 8 bytes, of float32 and the
 * scales on one of 4, of a 16-bit type on one of 2. Inputs and outputs must not overlap. Nothing is written if a check
 * fails.
 *
 * Environment: SQUISH_NF4_ISA=scalar|avx2|avx512|avx512_bf16 caps the processor path; it is read at the first call.
 */
#ifndef SQUISH_NF4_H
#define SQUISH_NF4_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define SQUISH_NF4_API __attribute__((visibility("default")))
#else
#define SQUISH_NF4_API
#endif

/* Raised by one when a function below changes its meaning or its arguments. */
#define SQUISH_NF4_C_VERSION 1
SQUISH_NF4_API int32_t squish_nf4_c_version(void);

/* Types of a dense matrix; the numbers are fixed. float64 can be quantized (rounded to float32 first), not decoded to.
 */
enum { SQUISH_NF4_FLOAT32 = 0, SQUISH_NF4_BFLOAT16 = 1, SQUISH_NF4_FLOAT16 = 2, SQUISH_NF4_FLOAT64 = 3 };

/* What the functions return; the numbers are fixed. */
enum {
  SQUISH_NF4_OK = 0,
  SQUISH_NF4_NULL_POINTER = 1, /* a pointer is null although there is something to read or write */
  SQUISH_NF4_BAD_DTYPE = 2,    /* not one of the types above, or float64 to decode to */
  SQUISH_NF4_BAD_SIZE = 3,     /* n or d is negative, d is odd, or n*d values have no address */
  SQUISH_NF4_BAD_GROUP = 4,    /* group_size is below 1 or does not divide d */
  SQUISH_NF4_BAD_ROWS = 5,     /* not 0 <= first_row <= last_row <= n */
  SQUISH_NF4_BAD_ISA = 6,      /* SQUISH_NF4_ISA names a path that is unknown or that this processor has not */
  SQUISH_NF4_MISALIGNED = 7    /* the address of a dense matrix or of the scales does not fit their type */
};

/* A sentence for a status; "unknown status" for any other number. */
SQUISH_NF4_API const char* squish_nf4_message(int32_t status);

/* Encodes rows [first_row, last_row) of w, an (n, d) matrix of `dtype`. A group that holds NaN or infinity gets a NaN
 * scale and decodes to NaN: see squish_nf4_first_non_finite. */
SQUISH_NF4_API int32_t squish_nf4_quantize(const void* w, int32_t dtype, int64_t n, int64_t d, int64_t group_size,
                                           int64_t first_row, int64_t last_row, uint8_t* packed, float* scales);

/* Decodes rows [first_row, last_row) into out, an (n, d) matrix of `dtype`: the float32 product, rounded once more to
 * nearest even for a 16-bit type. Scales may have any sign. */
SQUISH_NF4_API int32_t squish_nf4_dequantize(const uint8_t* packed, const float* scales, int64_t n, int64_t d,
                                             int64_t group_size, int64_t first_row, int64_t last_row, int32_t dtype,
                                             void* out);

/* The index of the first of `count` scales that is NaN, or -1: group i belongs to row i / (d / group_size). */
SQUISH_NF4_API int64_t squish_nf4_first_non_finite(const float* scales, int64_t count);

/* The 16 levels in ascending order. */
SQUISH_NF4_API const float* squish_nf4_levels(void);

/* "scalar", "avx2", "avx512" or "avx512_bf16": the path in use; NULL if SQUISH_NF4_ISA is bad. */
SQUISH_NF4_API const char* squish_nf4_isa(void);

#ifdef __cplusplus
}
#endif

#endif
