// The operators' schemas. The only file that says m.def.
#include <torch/library.h>

#include "csrc/ops/torch_compat.h"

// torch 2.13 and later compile an .out operator that carries this tag; to earlier ones it is unknown.
#if SQUISH_TORCH_AT_LEAST(2, 13)
#define SQUISH_OUT_TAGS \
  , { at::Tag::out }
#else
#define SQUISH_OUT_TAGS
#endif

TORCH_LIBRARY(squish, m) {
  m.def("quantize_nf4(Tensor w, int group_size=32) -> (Tensor packed, Tensor scales)");
  m.def("dequantize_nf4(Tensor packed, Tensor scales, int group_size=32, *, ScalarType? dtype=None) -> Tensor");
  m.def(
      "dequantize_nf4.out(Tensor packed, Tensor scales, int group_size=32, *, Tensor(a!) out) -> "
      "Tensor(a!)" SQUISH_OUT_TAGS);
  m.def("linear_nf4(Tensor x, Tensor packed, Tensor scales, Tensor? bias=None, int group_size=32) -> Tensor");
  m.def("_survey_nf4(Tensor w, Tensor packed, Tensor scales, int group_size) -> Tensor");
  m.def("_linear_nf4_grad_x(Tensor dy, Tensor packed, Tensor scales, int group_size, SymInt d) -> Tensor");
}
