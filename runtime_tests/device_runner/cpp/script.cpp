#include "script.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <memory>
#include <sstream>

#include "base/error.h"

namespace runner {
namespace {

constexpr int64_t kMost = 1'000'000'000;

[[noreturn]] void refuse(size_t line, const std::string& why) {
  throw Failure(Stage::usage, "script line " + std::to_string(line) + ": " + why);
}

/// Words between single spaces; an empty one stands for a space too many.
std::vector<std::string> split(const std::string& line) {
  std::vector<std::string> words(1);
  for (const char c : line) {
    if (c == ' ')
      words.emplace_back();
    else
      words.back() += c;
  }
  return words;
}

int64_t number(size_t line, const std::string& word, int64_t least) {
  int64_t value = 0;
  if (parse_number(word, least, &value)) return value;
  refuse(line, "'" + word + "' is not a number from " + std::to_string(least) + " to " + std::to_string(kMost));
}

void expect_words(size_t line, const std::vector<std::string>& words, size_t count) {
  if (words.size() != count) refuse(line, words[0] + " takes " + std::to_string(count - 1) + " number(s)");
}

Command parse(size_t line, const std::string& text) {
  const std::vector<std::string> words = split(text);
  const std::string& name = words[0];
  Command command = {};
  if (name == "reset" || name == "logits") {
    expect_words(line, words, 1);
    command.kind = name == "reset" ? Command::Kind::reset : Command::Kind::logits;
  } else if (name == "generate" || name == "top" || name == "rewind") {
    expect_words(line, words, 2);
    command.kind = name == "generate" ? Command::Kind::generate : name == "top" ? Command::Kind::top : Command::Kind::rewind;
    command.count = number(line, words[1], 1);
  } else if (name == "save" || name == "restore") {
    const auto shown = [](char c) { return c > ' ' && c <= '~'; };
    if (words.size() != 2 || words[1].empty() || !std::all_of(words[1].begin(), words[1].end(), shown))
      refuse(line, name + " takes the name of a file, in ASCII");
    command.kind = name == "save" ? Command::Kind::save : Command::Kind::restore;
    command.file = words[1];
  } else if (name == "feed") {
    if (words.size() < 2) refuse(line, "feed takes at least one token");
    command.kind = Command::Kind::feed;
    for (size_t i = 1; i < words.size(); ++i) command.tokens.push_back(number(line, words[i], 0));
  } else {
    refuse(line, "'" + name + "' is no command; known: reset, rewind, feed, generate, logits, top, save, restore");
  }
  return command;
}

/// The bytes of a file. Through C's streams: whether C++'s notice that a folder cannot be read differs among libraries.
std::string read_file(const std::string& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  std::string text;
  char part[1 << 14];
  for (size_t got; file && (got = std::fread(part, 1, sizeof part, file.get())) > 0;) text.append(part, got);
  if (!file || std::ferror(file.get())) throw Failure(Stage::usage, "cannot read the script " + path);
  return text;
}

}  // namespace

bool parse_number(const std::string& word, int64_t least, int64_t* value) {
  const char* end = word.data() + word.size();
  const auto [stopped, error] = std::from_chars(word.data(), end, *value);
  return error == std::errc() && stopped == end && *value >= least && *value <= kMost;
}

std::vector<Command> read_script(const std::string& path) {
  std::istringstream file(read_file(path));
  std::vector<Command> commands;
  std::string text;
  bool answer = false;  // whether there are logits at this point
  for (size_t line = 1; std::getline(file, text); ++line) {
    Command command = parse(line, text);
    const auto is = [&](Command::Kind kind) { return command.kind == kind; };
    if ((is(Command::Kind::generate) || is(Command::Kind::logits) || is(Command::Kind::top)) && !answer)
      refuse(line, "there are no logits before a feed");
    const bool moves = is(Command::Kind::reset) || is(Command::Kind::rewind) || is(Command::Kind::restore);
    answer = is(Command::Kind::feed) || (answer && !moves);
    commands.push_back(std::move(command));
  }
  if (commands.empty()) throw Failure(Stage::usage, "the script " + path + " is empty");
  return commands;
}

}  // namespace runner
