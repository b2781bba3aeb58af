// timing MODEL THREADS COUNT POSITION…: nanoseconds of COUNT single-token steps from each position on, one list for each.
//
// Filling a long context takes minutes, and a step's time does not depend on what was fed: the cache holds any numbers.
#include <cmath>
#include <cstdio>

#include "base/error.h"
#include "base/json.h"
#include "base/memory.h"
#include "base/threads.h"
#include "session.h"

namespace runner {
namespace {

constexpr int kDropped = 2;  // steps from each position on, before those that count

int64_t number_of(const std::string& word) {
  int64_t number = 0;
  if (!parse_number(word, 1, &number)) throw Failure(Stage::usage, "'" + word + "' is not a positive number");
  return number;
}

std::string answer(const std::vector<std::string>& words) {
  if (words.size() < 4) throw Failure(Stage::usage, "usage: timing MODEL THREADS COUNT POSITION…");
  if (!set_threads(number_of(words[1]))) throw Failure(Stage::load, "cannot start " + words[1] + " threads");
  Model model(words[0]);
  std::vector<std::string> lists;
  for (size_t i = 3; i < words.size(); ++i) {
    model.pretend(number_of(words[i]));
    std::vector<int64_t> times;
    for (int64_t step = -kDropped; step < number_of(words[2]); ++step) {
      const int64_t begun = now_ns();
      model.feed({0});
      if (step >= 0) times.push_back(now_ns() - begun);
    }
    if (!std::isfinite(model.logits()[0])) throw Failure(Stage::run, "logits are not finite at " + words[i]);
    lists.push_back(json::integers(times));
  }
  return json::object({{"ns", json::list(lists)}, {"peak_rss_bytes", std::to_string(peak_rss_bytes())}});
}

}  // namespace
}  // namespace runner

int main(int count, char** words) {
  try {
    std::printf("%s\n", runner::answer({words + 1, words + count}).c_str());
    return 0;
  } catch (const runner::Failure& failure) {
    std::fprintf(stderr, "%s\n", failure.what());
    return static_cast<int>(failure.stage);
  }
}
