// The error that ends a run: its stage, and the reason in one line.
#pragma once

#include <stdexcept>
#include <string>

namespace runner {

/// Exit statuses of the protocol.
enum class Stage { usage = 2, load = 3, run = 4 };

/// The line is for a person, `stage` for the program that started the runner.
struct Failure : std::runtime_error {
  Failure(Stage at, const std::string& line) : std::runtime_error(line), stage(at) {}
  Stage stage;
};

}  // namespace runner
