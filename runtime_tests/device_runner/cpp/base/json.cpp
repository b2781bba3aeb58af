#include "json.h"

#include <charconv>
#include <cmath>
#include <cstdio>

namespace runner::json {
namespace {

std::string joined(const std::vector<std::string>& values) {
  std::string out;
  for (const std::string& value : values) out += (out.empty() ? "" : ", ") + value;
  return out;
}

/// Bytes of the UTF-8 character at `at`; 0 if there is none.
size_t utf8_length(const std::string& s, size_t at) {
  const auto byte = [&](size_t i) { return i < s.size() ? static_cast<unsigned char>(s[i]) : 0U; };
  const unsigned first = byte(at), second = byte(at + 1);
  const size_t length = first < 0x80 ? 1 : first >= 0xC2 && first < 0xE0 ? 2 : first >= 0xE0 && first < 0xF0 ? 3
                        : first >= 0xF0 && first < 0xF5 ? 4 : 0;
  for (size_t i = 1; i < length; ++i)
    if ((byte(at + i) & 0xC0U) != 0x80U) return 0;
  const bool overlong = (first == 0xE0 && second < 0xA0) || (first == 0xF0 && second < 0x90);
  const bool outside = (first == 0xED && second >= 0xA0) || (first == 0xF4 && second >= 0x90);  // surrogates, > 10FFFF
  return overlong || outside ? 0 : length;
}

std::string escaped(char c) {
  if (c == '"' || c == '\\') return {'\\', c};
  if (static_cast<unsigned char>(c) >= 0x20) return {c};
  char code[8];
  std::snprintf(code, sizeof code, "\\u%04x", c);
  return code;
}

}  // namespace

std::string text(const std::string& value) {
  std::string out = "\"";
  for (size_t at = 0; at < value.size();) {
    const size_t length = utf8_length(value, at);
    out += length == 0 ? "?" : length == 1 ? escaped(value[at]) : value.substr(at, length);
    at += length == 0 ? 1 : length;
  }
  return out + '"';
}

std::string number(float value) {
  if (!std::isfinite(value)) return "null";
  char digits[32];
  return {digits, std::to_chars(digits, digits + sizeof digits, value).ptr};
}

std::string list(const std::vector<std::string>& values) { return "[" + joined(values) + "]"; }

std::string object(const std::vector<std::pair<std::string, std::string>>& fields) {
  std::vector<std::string> pairs;
  for (const auto& [key, value] : fields) pairs.push_back(text(key) + ": " + value);
  return "{" + joined(pairs) + "}";
}

}  // namespace runner::json
