#include "session.h"

#include <algorithm>
#include <chrono>
#include <numeric>

#include "base/error.h"
#include "saved.h"

namespace runner {
namespace {

int64_t timed_feed(Model& model, const std::vector<int64_t>& tokens) {
  const int64_t begun = now_ns();
  model.feed(tokens);
  return now_ns() - begun;
}

int64_t most_likely(const Model& model) {
  return std::max_element(model.logits(), model.logits() + model.vocab_size()) - model.logits();
}

Results::Generation generate(Model& model, int64_t count) {
  Results::Generation made;
  for (int64_t i = 0; i < count; ++i) {
    made.tokens.push_back(most_likely(model));
    made.ns.push_back(timed_feed(model, {made.tokens.back()}));
  }
  return made;
}

/// The largest logits, largest first; of equal ones the lower token first.
std::vector<std::pair<int64_t, float>> top(const Model& model, int64_t count) {
  if (count > model.vocab_size())
    throw Failure(
        Stage::run, "top " + std::to_string(count) + ": the vocabulary has " + std::to_string(model.vocab_size()));
  std::vector<int64_t> order(model.vocab_size());
  std::iota(order.begin(), order.end(), 0);
  const float* logits = model.logits();
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [logits](int64_t a, int64_t b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
  });
  std::vector<std::pair<int64_t, float>> largest;
  for (int64_t i = 0; i < count; ++i) largest.emplace_back(order[i], logits[order[i]]);
  return largest;
}

}  // namespace

int64_t now_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

Results run(const std::vector<Command>& script, Model& model, LogitsFile* logits) {
  Results results;
  for (const Command& command : script) {
    switch (command.kind) {
      case Command::Kind::reset:
        model.rewind(0);
        break;
      case Command::Kind::rewind:
        model.rewind(command.count);
        break;
      case Command::Kind::save:
        results.saved.push_back(save(model, command.file));
        break;
      case Command::Kind::restore:
        restore(model, command.file);
        break;
      case Command::Kind::feed:
        results.feeds.push_back({static_cast<int64_t>(command.tokens.size()), timed_feed(model, command.tokens)});
        break;
      case Command::Kind::generate:
        results.generated.push_back(generate(model, command.count));
        break;
      case Command::Kind::logits:
        logits->append(model.logits(), model.vocab_size());
        break;
      case Command::Kind::top:
        results.top.push_back(top(model, command.count));
        break;
    }
  }
  return results;
}

}  // namespace runner
