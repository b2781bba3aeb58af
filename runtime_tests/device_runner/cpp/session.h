// Runs a script on a model and collects the results.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "base/logits_file.h"
#include "model.h"
#include "script.h"

namespace runner {

/// Results of a script's commands, each list in their order.
struct Results {
  struct Feed {
    int64_t tokens, ns;
  };
  struct Generation {
    std::vector<int64_t> tokens, ns;
  };
  std::vector<Feed> feeds;
  std::vector<Generation> generated;
  std::vector<std::vector<std::pair<int64_t, float>>> top;
  std::vector<int64_t> saved;  // bytes
};

/// Nanoseconds of a clock that only goes forward.
int64_t now_ns();

/// Run every command. `logits` may be null if the script does not ask for them.
Results run(const std::vector<Command>& script, Model& model, LogitsFile* logits);

}  // namespace runner
