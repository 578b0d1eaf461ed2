// In a library that was built without CUDA kernels: what a call on CUDA tensors is told. Where there are kernels,
// setup.py takes the files cuda_*.cpp instead of this one.
#include <torch/library.h>

namespace squish::ops {
namespace {

void refuse(const c10::OperatorHandle& op, torch::jit::Stack*) {
  const std::string& name = op.operator_name().name;
  TORCH_CHECK_NOT_IMPLEMENTED(false, name.substr(name.rfind(':') + 1),
                              ": squish_nf4 was built for the CPU only, and has no kernels for CUDA tensors; "
                              "squish-nf4 doctor says why, and SQUISH_CUDA=1 makes a build fail without them");
}

}  // namespace

TORCH_LIBRARY_IMPL(squish, CUDA, m) {
  for (const char* op :
       {"quantize_nf4", "dequantize_nf4", "dequantize_nf4.out", "linear_nf4", "_survey_nf4", "_linear_nf4_grad_x"})
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse>());
}

}  // namespace squish::ops
