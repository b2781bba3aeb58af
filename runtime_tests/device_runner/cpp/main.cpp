// runner MODEL SCRIPT [--threads N] [--logits FILE]: executes a .pte as docs/runner.md specifies.
#include <algorithm>
#include <cstdio>
#include <optional>

#include "base/error.h"
#include "base/json.h"
#include "base/memory.h"
#include "base/threads.h"
#include "session.h"

namespace runner {
namespace {

constexpr int64_t kMostThreads = 1024;

struct Arguments {
  std::string model, script, logits;
  std::optional<int64_t> threads;
};

[[noreturn]] void refuse(const std::string& why) {
  throw Failure(Stage::usage, why + "; usage: runner MODEL SCRIPT [--threads N] [--logits FILE]");
}

Arguments parse(const std::vector<std::string>& words) {
  Arguments arguments;
  std::vector<std::string> files;
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    const bool option = word == "--threads" || word == "--logits";
    if (!option && word.rfind("--", 0) == 0) refuse("unknown option " + word);
    if (!option) {
      files.push_back(word);
      continue;
    }
    if (++i == words.size() || words[i].empty()) refuse(word + " needs a value");
    int64_t count = 0;
    if (word == "--logits")
      arguments.logits = words[i];
    else if (parse_number(words[i], 1, &count) && count <= kMostThreads)
      arguments.threads = count;
    else
      refuse("--threads takes 1 to " + std::to_string(kMostThreads) + ", not '" + words[i] + "'");
  }
  if (files.size() != 2) refuse(std::to_string(files.size()) + " file(s) given");
  arguments.model = files[0], arguments.script = files[1];
  return arguments;
}

std::string feeds(const Results& results) {
  std::vector<std::string> out;
  for (const auto& feed : results.feeds)
    out.push_back(json::object({{"tokens", std::to_string(feed.tokens)}, {"ns", std::to_string(feed.ns)}}));
  return json::list(out);
}

std::string generated(const Results& results) {
  std::vector<std::string> out;
  for (const auto& made : results.generated)
    out.push_back(json::object({{"tokens", json::integers(made.tokens)}, {"ns", json::integers(made.ns)}}));
  return json::list(out);
}

std::string top(const Results& results) {
  std::vector<std::string> out;
  for (const auto& largest : results.top) {
    std::vector<std::string> pairs;
    for (const auto& [token, logit] : largest)
      pairs.push_back(json::list({std::to_string(token), json::number(logit)}));
    out.push_back(json::list(pairs));
  }
  return json::list(out);
}

std::string answer(const std::vector<std::string>& words) {
  const Arguments arguments = parse(words);
  const std::vector<Command> script = read_script(arguments.script);
  const auto asks = [](const Command& command) { return command.kind == Command::Kind::logits; };
  if (arguments.logits.empty() && std::any_of(script.begin(), script.end(), asks))
    refuse("the script asks for logits, and there is no --logits FILE");
  const size_t threads = arguments.threads.value_or(default_threads());
  if (!set_threads(threads)) throw Failure(Stage::load, "cannot start " + std::to_string(threads) + " threads");
  const int64_t before_bytes = rss_bytes(), begun = now_ns();
  Model model(arguments.model);
  const int64_t load_ns = now_ns() - begun;
  std::optional<LogitsFile> logits;
  if (!arguments.logits.empty()) logits.emplace(arguments.logits);
  const Results results = run(script, model, logits ? &*logits : nullptr);
  if (logits) logits->close();
  return json::object({
      {"runner", json::text("pte")},
      {"runtime", json::text("executorch " EXECUTORCH_VERSION)},
      {"threads", std::to_string(threads)},
      {"vocab_size", std::to_string(model.vocab_size())},
      {"context_length", std::to_string(model.context_length())},
      {"load_ns", std::to_string(load_ns)},
      {"feeds", feeds(results)},
      {"generated", generated(results)},
      {"top", top(results)},
      {"saved", json::integers(results.saved)},
      {"logits_rows", std::to_string(logits ? logits->rows() : 0)},
      {"logits_crc32", json::text(logits ? logits->crc32() : "00000000")},
      {"rss_before_load_bytes", std::to_string(before_bytes)},
      {"peak_rss_bytes", std::to_string(peak_rss_bytes())},
  });
}

const char* name(Stage stage) { return stage == Stage::usage ? "usage" : stage == Stage::load ? "load" : "run"; }

int print(const std::string& line, int status) {
  const bool printed = std::printf("%s\n", line.c_str()) >= 0 && std::fflush(stdout) == 0;
  return printed ? status : static_cast<int>(Stage::run);
}

int main_of(const std::vector<std::string>& words) {
  try {
    return print(answer(words), 0);
  } catch (const Failure& failure) {
    const std::string line = json::object({{"error", json::text(failure.what())}, {"stage", json::text(name(failure.stage))}});
    return print(line, static_cast<int>(failure.stage));
  } catch (const std::bad_alloc&) {
    return print(json::object({{"error", json::text("out of memory")}, {"stage", json::text("run")}}), 4);
  }
}

}  // namespace
}  // namespace runner

int main(int count, char** words) { return runner::main_of({words + std::min(count, 1), words + count}); }
