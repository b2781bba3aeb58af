// Copies new keys or values into their cache, independent of ExecuTorch.
#pragma once

#include <cstdint>
#include <cstring>

namespace runner {

/// Bytes of `count` positions from `from` to position `start` of a cache of `capacity`; false if they do not fit.
inline bool copy_into_cache(
    void* cache, const void* from, int64_t start, int64_t count, int64_t capacity, int64_t bytes_per_position) {
  if (start < 0 || count < 0 || start > capacity || count > capacity - start) return false;
  std::memcpy(static_cast<char*>(cache) + start * bytes_per_position, from, count * bytes_per_position);
  return true;
}

}  // namespace runner
