// The kernels for a caller in another language; the runner does not contain this file.
#include <atomic>
#include <thread>
#include <vector>

#include "attention.h"
#include "cache.h"

using runner::Attention;
using runner::Isa;
using runner::Parallel;

extern "C" {

int best_isa() { return static_cast<int>(runner::best_isa()); }

void attend(const Attention* call, int isa, int threads) {
  const auto run = [threads](const std::function<void(size_t)>& task, size_t count) {
    std::atomic<size_t> next = 0;
    const auto work = [&] {
      for (size_t i = next++; i < count; i = next++) task(i);
    };
    std::vector<std::thread> started;
    for (int i = 1; i < threads; ++i) started.emplace_back(work);
    work();
    for (std::thread& thread : started) thread.join();
  };
  runner::attend(*call, static_cast<Isa>(isa), Parallel{static_cast<size_t>(threads), run});
}

int copy_into_cache(
    void* cache, const void* from, int64_t start, int64_t count, int64_t capacity, int64_t bytes_per_position) {
  return runner::copy_into_cache(cache, from, start, count, capacity, bytes_per_position) ? 1 : 0;
}
}
