// The script: one command per line. Knows nothing about models.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace runner {

/// One line of the script.
struct Command {
  enum class Kind { reset, feed, generate, logits, top };
  Kind kind;
  std::vector<int64_t> tokens;  // of feed
  int64_t count = 0;            // of generate and top
};

/// Every command; a line that is not one is a usage failure that names it.
std::vector<Command> read_script(const std::string& path);

/// A decimal number from `least` on, nothing before or after it; false if it is none.
bool parse_number(const std::string& word, int64_t least, int64_t* value);

}  // namespace runner
