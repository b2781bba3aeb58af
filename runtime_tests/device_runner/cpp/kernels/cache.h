// Copies new keys or values into their cache, independent of ExecuTorch, and knows the caches that were written.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace runner {

/// Bytes of `count` positions from `from` to position `start` of a cache of `capacity`; false if they do not fit.
inline bool copy_into_cache(
    void* cache, const void* from, int64_t start, int64_t count, int64_t capacity, int64_t bytes_per_position) {
  if (start < 0 || count < 0 || start > capacity || count > capacity - start) return false;
  std::memcpy(static_cast<char*>(cache) + start * bytes_per_position, from, count * bytes_per_position);
  return true;
}

/// A buffer of the cache: `slots` positions of `slot_bytes` each.
struct CacheBuffer {
  void* data;
  int64_t slots;
  size_t slot_bytes;
};

/// Every buffer that was written since the program began, in the order of their first writing.
inline std::vector<CacheBuffer>& written_caches() {
  static std::vector<CacheBuffer> buffers;
  return buffers;
}

inline void note_written(void* data, int64_t slots, int64_t slot_bytes) {
  auto& buffers = written_caches();
  for (const auto& known : buffers)
    if (known.data == data) return;
  buffers.push_back({data, slots, static_cast<size_t>(slot_bytes)});
}

}  // namespace runner
