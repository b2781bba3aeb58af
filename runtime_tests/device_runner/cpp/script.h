// The script: one command per line.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace runner {

/// One line of the script.
struct Command {
  enum class Kind { reset, rewind, feed, generate, logits, top, save, restore };
  Kind kind;
  std::vector<int64_t> tokens;  // of feed
  int64_t count = 0;            // of rewind, generate and top
  std::string file;             // of save and restore
};

/// Every command; a line that is not one is a usage failure that names the line.
std::vector<Command> read_script(const std::string& path);

/// Parse a decimal number of at least `least` with nothing before or after it; false if the word is none.
bool parse_number(const std::string& word, int64_t least, int64_t* value);

}  // namespace runner
