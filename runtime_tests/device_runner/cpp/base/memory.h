// Resident memory of this process, as Linux counts it.
#pragma once

#include <cstdint>

namespace runner {

int64_t rss_bytes();
int64_t peak_rss_bytes();

}  // namespace runner
