// The definition of NF4's index, stated apart from csrc/: this header and its source include nothing of the project.
#pragma once

#include <cstdint>

namespace definition {

inline constexpr int kLevels = 16;
inline constexpr int kBlock = 1024;

// index[i] = argmin over k of |quotient[i] - level[k]| in float32, the lower k on a tie. For kBlock quotients.
void nearest_levels(const float* quotient, const float* level, int32_t* index);

}  // namespace definition
