// The threads of torch, reached by the function that torch compiled. at::parallel_for is a template around an OpenMP
// pragma: compiled here, it would tie us to the OpenMP library of our own compiler (clang's is not GCC's, and one
// process with both has two pools of threads), and without -fopenmp it would silently use one thread.
#pragma once

#include <c10/util/Exception.h>
#include <torch/csrc/stable/c/shim.h>

#include <exception>
#include <mutex>

namespace squish::ops {

// Calls f(first, last) for stretches of [begin, end) of at least `grain` each, on torch's threads. What a call throws
// (there may be no memory for its scratch) is thrown here, when all are done.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  struct Calls {
    const F& f;
    std::mutex mutex;
    std::exception_ptr thrown;
  } calls{f, {}, {}};
  const auto call = [](int64_t first, int64_t last, void* context) {
    Calls& all = *static_cast<Calls*>(context);
    try {
      all.f(first, last);
    } catch (...) {
      const std::scoped_lock lock(all.mutex);
      all.thrown = std::current_exception();
    }
  };
  const AOTITorchError error = torch_parallel_for(begin, end, grain, call, &calls);
  if (calls.thrown) std::rethrow_exception(calls.thrown);
  TORCH_INTERNAL_ASSERT(error == AOTI_TORCH_SUCCESS);
}

}  // namespace squish::ops
