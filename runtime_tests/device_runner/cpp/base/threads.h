// ExecuTorch's thread pool, which XNNPACK and our kernels share. Nothing else here starts threads.
#pragma once

#include <cstddef>

#include "../kernels/parallel.h"

namespace runner {

/// One thread per fast core: the number where the command line has none.
size_t default_threads();

/// Set the size of the pool. Must come before a program is loaded: delegates keep the pool they were loaded with.
bool set_threads(size_t count);

/// The pool as kernels see it.
const Parallel& pool();

}  // namespace runner
