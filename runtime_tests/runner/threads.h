// ExecuTorch's thread pool, which XNNPACK and our kernels share. Nothing else here starts threads.
#pragma once

#include <cstddef>

#include "kernels/parallel.h"

namespace runner {

/// One thread per fast core, for callers who do not say.
size_t default_threads();

/// Make the pool that large. Must come before a program is loaded: delegates keep the pool they were loaded with.
bool set_threads(size_t count);

/// The pool as kernels see it.
const Parallel& pool();

}  // namespace runner
