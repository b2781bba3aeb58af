// How a kernel spreads its tasks over threads: given to it, so that it belongs to no thread pool.
#pragma once

#include <cstddef>
#include <functional>

namespace runner {

/// `run(task, count)` calls task(0) … task(count - 1), in any order, and returns when all are done.
struct Parallel {
  size_t threads;
  std::function<void(const std::function<void(size_t)>& task, size_t count)> run;
};

}  // namespace runner
