#include "memory.h"

#include <fstream>
#include <string>

namespace runner {
namespace {

constexpr int64_t kBytesPerKb = 1024;

/// A line of /proc/self/status in bytes; 0 where there is none (an emulator's /proc, say).
int64_t status(const std::string& key) {
  std::ifstream file("/proc/self/status");
  for (std::string word; file >> word;) {
    int64_t kb = 0;
    if (word == key && file >> kb) return kb * kBytesPerKb;
  }
  return 0;
}

}  // namespace

int64_t rss_bytes() { return status("VmRSS:"); }

// not getrusage: its maximum includes that of the process that started this one
int64_t peak_rss_bytes() { return status("VmHWM:"); }

}  // namespace runner
