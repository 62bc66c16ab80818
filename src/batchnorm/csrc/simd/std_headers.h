// All standard headers that the loops use. A translation unit includes this file before it sets an instruction set by a
// pragma: vectors.h says why.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../kernels/kernel_table.h"
