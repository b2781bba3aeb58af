// What ends a run early: at which stage, and why, in one line.
#pragma once

#include <stdexcept>
#include <string>

namespace runner {

/// Exit statuses of the protocol.
enum class Stage { usage = 2, load = 3, run = 4 };

/// One line for a person; `stage` is for the program that started us.
struct Failure : std::runtime_error {
  Failure(Stage at, const std::string& line) : std::runtime_error(line), stage(at) {}
  Stage stage;
};

}  // namespace runner
