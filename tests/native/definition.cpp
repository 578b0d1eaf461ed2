// Compiled for the machine at hand: the compiler makes vector code of these loops, which is what makes all floats
// quick.
#include "tests/native/definition.h"

#include <cmath>

namespace definition {

void nearest_levels(const float* quotient, const float* level, int32_t* index) {
  float least[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    least[i] = std::fabs(quotient[i] - level[0]);
    index[i] = 0;
  }
  for (int k = 1; k < kLevels; ++k)
    for (int i = 0; i < kBlock; ++i) {
      const float distance = std::fabs(quotient[i] - level[k]);
      const bool nearer = distance < least[i];
      least[i] = nearer ? distance : least[i];
      index[i] = nearer ? k : index[i];
    }
}

}  // namespace definition
