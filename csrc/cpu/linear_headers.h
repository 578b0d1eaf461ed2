// What linear_loops.h needs, to be included before the target region begins.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "csrc/cpu/kernels.h"
