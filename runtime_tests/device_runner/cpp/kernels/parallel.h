// How a kernel spreads its tasks over threads, which is given to it, so that it belongs to no thread pool; and the memory
// that threads keep from one call to the next, for a decode step has dozens of calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace runner {

/// `run(task, count)` calls task(0) … task(count - 1), in any order, and returns when all are done.
struct Parallel {
  size_t threads;
  std::function<void(const std::function<void(size_t)>& task, size_t count)> run;
};

constexpr int64_t kLine = 16;  // floats of a cache line

/// Whose it is: a task's own, or where a call's tasks leave what the thread that began them puts together.
enum class Scratch { task, call };

/// Floats, aligned to a cache line, valid until this thread asks for more of the same kind.
template <Scratch kind>
float* scratch(int64_t floats) {
  thread_local std::vector<float> room;
  if (room.size() < static_cast<size_t>(floats + kLine)) room.resize(floats + kLine);
  const auto place = reinterpret_cast<uintptr_t>(room.data());
  return room.data() + (64 - place % 64) % 64 / sizeof(float);
}

}  // namespace runner
