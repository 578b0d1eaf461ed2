// Where the versions of torch that we compile for differ.
#pragma once

#include <torch/csrc/autograd/function.h>
#if __has_include(<torch/headeronly/version.h>)
#include <torch/headeronly/version.h>
#else
#include <torch/version.h>
#endif

#include <memory>

#define SQUISH_TORCH_AT_LEAST(major, minor) \
  (TORCH_VERSION_MAJOR > (major) || (TORCH_VERSION_MAJOR == (major) && TORCH_VERSION_MINOR >= (minor)))

namespace squish::ops {

// Who owns an autograd node: a shared_ptr until torch 2.12, an intrusive_ptr since 2.13.
#if SQUISH_TORCH_AT_LEAST(2, 13)
template <typename T>
using NodePtr = c10::intrusive_ptr<T>;
template <typename T>
NodePtr<T> make_node() {
  return c10::make_intrusive<T>();
}
#else
template <typename T>
using NodePtr = std::shared_ptr<T>;
template <typename T>
NodePtr<T> make_node() {
  return {new T(), torch::autograd::deleteNode};
}
#endif

}  // namespace squish::ops
