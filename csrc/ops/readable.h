// Tensors as kernels read them: columns that are neighbours, at an address that fits their type. Other ones are copied.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace squish::ops {

// False for what torch.frombuffer or from_blob made of an odd place in somebody's memory.
inline bool is_aligned(const at::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.element_size() == 0;
}

// What is written cannot be copied first.
inline void check_aligned(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(is_aligned(tensor), op, ": ", name, " must lie at a multiple of its ", tensor.element_size(),
                    " bytes an element, and its address is none");
}

inline at::Tensor readable(const at::Tensor& tensor) {
  return is_aligned(tensor) ? tensor.contiguous() : tensor.clone(at::MemoryFormat::Contiguous);
}

// Of a matrix whose rows may lie anywhere.
inline at::Tensor readable_rows(const at::Tensor& matrix) {
  return matrix.stride(1) == 1 && is_aligned(matrix) ? matrix : matrix.clone(at::MemoryFormat::Contiguous);
}

}  // namespace squish::ops
