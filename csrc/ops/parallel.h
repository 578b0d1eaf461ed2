// The threads of torch, reached by the function that torch compiled. at::parallel_for is a template around an OpenMP
// pragma: compiled here, it would tie us to the OpenMP library of our own compiler (clang's is not GCC's, and one
// process with both has two pools of threads), and without -fopenmp it would silently use one thread.
#pragma once

#include <c10/util/Exception.h>
#include <torch/csrc/stable/c/shim.h>

namespace squish::ops {

// Calls f(first, last) for stretches of [begin, end) of at least `grain` each, on torch's threads. f must not throw.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const auto call = [](int64_t first, int64_t last, void* context) { (*static_cast<const F*>(context))(first, last); };
  const AOTITorchError error = torch_parallel_for(begin, end, grain, call, const_cast<F*>(&f));
  TORCH_INTERNAL_ASSERT(error == AOTI_TORCH_SUCCESS);
}

}  // namespace squish::ops
