// Memory that a thread keeps from one call to the next: a decode step has dozens of calls.
#pragma once

#include <cstdint>
#include <vector>

namespace runner {

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
