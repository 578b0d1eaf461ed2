// Who owns an autograd node: a shared_ptr until torch 2.12, an intrusive_ptr since 2.13.
#pragma once

#include <torch/csrc/autograd/function.h>

#include <memory>

#include "csrc/ops/torch_version.h"

namespace squish::ops {

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
