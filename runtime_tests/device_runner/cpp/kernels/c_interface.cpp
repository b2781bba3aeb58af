// The kernels for a caller in another language; the runner does not contain this file.
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "attention.h"
#include "cache.h"

using runner::Attention;
using runner::Bfloat16;
using runner::Int8Attention;
using runner::Isa;
using runner::Parallel;

namespace {

/// Threads that wait for the next run by asking for it, as those of a runtime do within a step.
class Threads {
 public:
  explicit Threads(int count) {
    for (int i = 1; i < count; ++i)
      others_.emplace_back([this] {
        for (size_t seen = 0;;) {
          size_t run = 0;
          while ((run = run_.load()) == seen) std::this_thread::yield();
          if (run == kEnd) return;
          seen = run;
          work();
          ++done_;
        }
      });
  }
  ~Threads() {
    run_ = kEnd;
    for (std::thread& other : others_) other.join();
  }
  Parallel parallel() {
    return {others_.size() + 1, [this](const std::function<void(size_t)>& task, size_t count) {
              task_ = &task, count_ = count, next_ = 0, done_ = 0;
              ++run_;
              work();
              while (done_ < others_.size()) std::this_thread::yield();
            }};
  }

 private:
  static constexpr size_t kEnd = ~size_t{0};
  void work() {
    for (size_t i = next_++; i < count_; i = next_++) (*task_)(i);
  }
  const std::function<void(size_t)>* task_ = nullptr;
  size_t count_ = 0;
  std::atomic<size_t> run_ = 0, next_ = 0, done_ = 0;
  std::vector<std::thread> others_;
};

template <class Number>
void call(const Attention<Number>& one, Isa isa, const Parallel& parallel) {
  runner::attend(one, isa, parallel);
}
void call(const Int8Attention& one, Isa isa, const Parallel& parallel) { runner::attend_int8(one, isa, parallel); }

/// Nanoseconds of `runs` calls, one after the other.
template <class Call>
int64_t timed(const Call* one, int isa, int threads, int runs) {
  Threads pool(threads);
  const Parallel parallel = pool.parallel();
  const auto begun = std::chrono::steady_clock::now();
  for (int i = 0; i < runs; ++i) call(*one, static_cast<Isa>(isa), parallel);
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - begun).count();
}

}  // namespace

extern "C" {

int best_isa() { return static_cast<int>(runner::best_isa()); }

int64_t attend(const Attention<float>* call, int isa, int threads, int runs) { return timed(call, isa, threads, runs); }

int64_t attend_bfloat16(const Attention<Bfloat16>* call, int isa, int threads, int runs) {
  return timed(call, isa, threads, runs);
}

int64_t attend_int8(const Int8Attention* call, int isa, int threads, int runs) {
  return timed(call, isa, threads, runs);
}

int copy_into_cache(
    void* cache, const void* from, int64_t start, int64_t count, int64_t capacity, int64_t bytes_per_position) {
  return runner::copy_into_cache(cache, from, start, count, capacity, bytes_per_position) ? 1 : 0;
}
}
