/* The C interface from C99: a row worked by hand, ranges of rows, and every status. Prints the path in use. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "csrc/c/squish_nf4.h"

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      fprintf(stderr, "%s:%d: not %s\n", __FILE__, __LINE__, #condition); \
      exit(1);                                                            \
    }                                                                     \
  } while (0)

enum { N = 5, D = 24, GROUP = 3 };

static float w[N * D], decoded[N * D];
static uint8_t packed[N * D / 2], in_ranges[N * D / 2];
static float scales[N * D / GROUP], scales_in_ranges[N * D / GROUP];

static int32_t quantize(int32_t dtype, int64_t n, int64_t d, int64_t group, int64_t first, int64_t last) {
  return squish_nf4_quantize(w, dtype, n, d, group, first, last, packed, scales);
}

static int32_t dequantize(int32_t dtype, int64_t n, int64_t d, int64_t group, int64_t first, int64_t last) {
  return squish_nf4_dequantize(packed, scales, n, d, group, first, last, dtype, decoded);
}

static void test_a_row_worked_by_hand(void) {
  const float row[4] = {-2.0f, 0.0f, 2.0f, 0.9f}; /* over 2: -1, 0, 1, 0.45 -> levels 0, 7, 15, 12 */
  uint8_t bytes[2];
  float scale[1], back[4];
  CHECK(squish_nf4_quantize(row, SQUISH_NF4_FLOAT32, 1, 4, 4, 0, 1, bytes, scale) == SQUISH_NF4_OK);
  CHECK(bytes[0] == 0x70 && bytes[1] == 0xcf && scale[0] == 2.0f);
  CHECK(squish_nf4_dequantize(bytes, scale, 1, 4, 4, 0, 1, SQUISH_NF4_FLOAT32, back) == SQUISH_NF4_OK);
  CHECK(back[0] == -2.0f && back[1] == 0.0f && back[2] == 2.0f && back[3] == 2.0f * squish_nf4_levels()[12]);
}

static void test_ranges_of_rows_make_the_whole(void) {
  int64_t row;
  CHECK(quantize(SQUISH_NF4_FLOAT32, N, D, GROUP, 0, N) == SQUISH_NF4_OK);
  for (row = N; row-- > 0;)
    CHECK(squish_nf4_quantize(w, SQUISH_NF4_FLOAT32, N, D, GROUP, row, row + 1, in_ranges, scales_in_ranges) == 0);
  CHECK(memcmp(packed, in_ranges, sizeof packed) == 0);
  CHECK(memcmp(scales, scales_in_ranges, sizeof scales) == 0);
}

static void test_non_finite_groups_are_found(void) {
  const float saved = w[2 * D + 4];
  CHECK(squish_nf4_first_non_finite(scales, N * D / GROUP) == -1);
  w[2 * D + 4] = INFINITY;
  CHECK(quantize(SQUISH_NF4_FLOAT32, N, D, GROUP, 0, N) == SQUISH_NF4_OK);
  CHECK(squish_nf4_first_non_finite(scales, N * D / GROUP) == 2 * (D / GROUP) + 1);
  CHECK(dequantize(SQUISH_NF4_FLOAT32, N, D, GROUP, 0, N) == SQUISH_NF4_OK);
  CHECK(isnan(decoded[2 * D + 3]) && !isnan(decoded[2 * D + 2]) && !isnan(decoded[2 * D + 6]));
  w[2 * D + 4] = saved;
}

static void test_every_status(void) {
  int32_t status;
  CHECK(quantize(4, N, D, GROUP, 0, N) == SQUISH_NF4_BAD_DTYPE);
  CHECK(quantize(-1, N, D, GROUP, 0, N) == SQUISH_NF4_BAD_DTYPE);
  CHECK(dequantize(SQUISH_NF4_FLOAT64, N, D, GROUP, 0, N) == SQUISH_NF4_BAD_DTYPE);
  CHECK(quantize(0, -1, D, GROUP, 0, 0) == SQUISH_NF4_BAD_SIZE);
  CHECK(quantize(0, N, -2, GROUP, 0, 0) == SQUISH_NF4_BAD_SIZE);
  CHECK(quantize(0, N, 7, 7, 0, N) == SQUISH_NF4_BAD_SIZE);
  CHECK(quantize(0, INT64_MAX / 4, 4, 4, 0, 0) == SQUISH_NF4_BAD_SIZE);
  CHECK(quantize(0, N, D, 0, 0, N) == SQUISH_NF4_BAD_GROUP);
  CHECK(quantize(0, N, D, 5, 0, N) == SQUISH_NF4_BAD_GROUP);
  CHECK(quantize(0, N, D, GROUP, -1, N) == SQUISH_NF4_BAD_ROWS);
  CHECK(quantize(0, N, D, GROUP, 0, N + 1) == SQUISH_NF4_BAD_ROWS);
  CHECK(dequantize(0, N, D, GROUP, 3, 2) == SQUISH_NF4_BAD_ROWS);
  CHECK(squish_nf4_quantize(NULL, 0, N, D, GROUP, 0, N, packed, scales) == SQUISH_NF4_NULL_POINTER);
  CHECK(squish_nf4_dequantize(packed, NULL, N, D, GROUP, 0, N, 0, decoded) == SQUISH_NF4_NULL_POINTER);
  CHECK(squish_nf4_quantize(NULL, 0, 0, D, GROUP, 0, 0, NULL, NULL) == SQUISH_NF4_OK); /* nothing to do */
  CHECK(squish_nf4_quantize(NULL, 0, N, D, GROUP, 2, 2, NULL, NULL) == SQUISH_NF4_OK);
  for (status = SQUISH_NF4_OK; status <= SQUISH_NF4_MISALIGNED; ++status)
    CHECK(strcmp(squish_nf4_message(status), "unknown status") != 0);
  CHECK(strcmp(squish_nf4_message(SQUISH_NF4_MISALIGNED + 1), "unknown status") == 0);
}

/* Values at every address: those that do not fit their type are refused, and nothing is written. */
static void test_alignment(void) {
  enum { ROOM = 4 * sizeof(double) };
  const int32_t sizes[] = {4, 2, 2, 8};
  double dense[4 + 1] = {0}, scale[1 + 1] = {0};
  uint8_t bytes[2];
  int32_t dtype, shift;
  for (dtype = SQUISH_NF4_FLOAT32; dtype <= SQUISH_NF4_FLOAT64; ++dtype)
    for (shift = 0; shift < 8; ++shift) {
      char* w_at = (char*)dense + shift;
      float* scale_at = (float*)(void*)((char*)scale + shift);
      const int32_t of_w = shift % sizes[dtype] == 0 ? SQUISH_NF4_OK : SQUISH_NF4_MISALIGNED;
      const int32_t of_scale = shift % 4 == 0 ? SQUISH_NF4_OK : SQUISH_NF4_MISALIGNED;
      bytes[1] = 0xab;
      CHECK(squish_nf4_quantize(w_at, dtype, 1, 4, 4, 0, 1, bytes, (float*)scale) == of_w);
      CHECK((bytes[1] == 0xab) == (of_w != SQUISH_NF4_OK));
      CHECK(squish_nf4_quantize(dense, dtype, 1, 4, 4, 0, 1, bytes, scale_at) == of_scale);
      if (dtype == SQUISH_NF4_FLOAT64) continue;
      CHECK(squish_nf4_dequantize(bytes, (float*)scale, 1, 4, 4, 0, 1, dtype, w_at) == of_w);
      CHECK(squish_nf4_dequantize(bytes, scale_at, 1, 4, 4, 0, 1, dtype, dense) == of_scale);
      memset(dense, 0, ROOM);
    }
  for (shift = 0; shift < 8; ++shift) { /* only read, at any address */
    const float not_a_number = NAN;
    memcpy((char*)scale + shift, &not_a_number, sizeof not_a_number);
    CHECK(squish_nf4_first_non_finite((float*)(void*)((char*)scale + shift), 1) == 0);
  }
}

int main(void) {
  int i;
  CHECK(squish_nf4_c_version() == SQUISH_NF4_C_VERSION);
  if (squish_nf4_isa() == NULL) {
    const float row[2] = {0};
    uint8_t byte = 7;
    float scale;
    CHECK(squish_nf4_quantize(row, SQUISH_NF4_FLOAT32, 1, 2, 2, 0, 1, &byte, &scale) == SQUISH_NF4_BAD_ISA);
    CHECK(byte == 7);
    return 3;
  }
  for (i = 0; i < N * D; ++i) w[i] = sinf(0.7f * (float)i);
  test_a_row_worked_by_hand();
  test_ranges_of_rows_make_the_whole();
  test_non_finite_groups_are_found();
  test_every_status();
  test_alignment();
  puts(squish_nf4_isa());
  return 0;
}
