#include "threads.h"

#include <executorch/runtime/core/function_ref.h>

#include <cstdint>

// The library exports these, but its headers for them are not shipped; a changed signature fails to link.
namespace executorch::extension {
namespace cpuinfo {
uint32_t get_num_performant_cores();
}
namespace threadpool {
class ThreadPool {
 public:
  size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(uint32_t count);
  void run(runtime::FunctionRef<void(size_t)> task, size_t range);
};
ThreadPool* get_threadpool();
}  // namespace threadpool
}  // namespace executorch::extension

namespace runner {

using executorch::extension::threadpool::get_threadpool;

size_t default_threads() {
  const uint32_t cores = executorch::extension::cpuinfo::get_num_performant_cores();
  return cores == 0 ? 1 : cores;
}

bool set_threads(size_t count) {
  auto* threads = get_threadpool();
  return threads != nullptr && threads->_unsafe_reset_threadpool(static_cast<uint32_t>(count)) &&
         threads->get_thread_count() == count;
}

const Parallel& pool() {
  static const Parallel shared = {
      get_threadpool()->get_thread_count(),
      [](const std::function<void(size_t)>& task, size_t count) { get_threadpool()->run(task, count); }};
  return shared;
}

}  // namespace runner
