// What linear_nf4 is told of a nested tensor of the strided layout, which torch keeps for older programs. One of the
// jagged layout reaches the other kernels as the matrix of its rows (squish_nf4/nn/linear.py).
#include <torch/library.h>

#include "csrc/ops/checks.h"

namespace squish::ops {
namespace {

Tensor linear_nf4(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, int64_t) {
  TORCH_CHECK_NOT_IMPLEMENTED(false,
                              "linear_nf4: x is a nested tensor of layout torch.strided; make it with "
                              "layout=torch.jagged, or call the layer on its parts");
}

}  // namespace

TORCH_LIBRARY_IMPL(squish, NestedTensorCPU, m) { m.impl("linear_nf4", &linear_nf4); }
TORCH_LIBRARY_IMPL(squish, NestedTensorCUDA, m) { m.impl("linear_nf4", &linear_nf4); }

}  // namespace squish::ops
