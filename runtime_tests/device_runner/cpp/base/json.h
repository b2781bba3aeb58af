// JSON text, as far as an answer needs it.
#pragma once

#include <string>
#include <vector>

namespace runner::json {

/// A string in quotes; bytes that are not UTF-8 become '?'.
std::string text(const std::string& value);

/// A float with enough digits to read the same value back; null if it is not finite.
std::string number(float value);

/// [a, b, …] of values that are JSON already.
std::string list(const std::vector<std::string>& values);

/// [1, 2, …]
template <typename Integer>
std::string integers(const std::vector<Integer>& values) {
  std::vector<std::string> words;
  for (const Integer value : values) words.push_back(std::to_string(value));
  return list(words);
}

/// {"key": value, …}, the values being JSON already.
std::string object(const std::vector<std::pair<std::string, std::string>>& fields);

}  // namespace runner::json
