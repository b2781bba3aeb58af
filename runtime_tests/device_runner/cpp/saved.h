// A filled KV cache as a file, as docs/runner.md specifies.
#pragma once

#include <cstdint>
#include <string>

#include "model.h"

namespace runner {

/// Write the tokens fed and the slots that they fill, whole or not at all; bytes of the file.
int64_t save(Model& model, const std::string& path);

/// Fill the cache from a file; a run failure, the cache being as it was, where it is none of this model's.
void restore(Model& model, const std::string& path);

}  // namespace runner
