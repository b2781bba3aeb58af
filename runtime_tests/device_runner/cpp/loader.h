// ExecuTorch's data loader over a mapped file, of which little is resident while a program is loaded.
#pragma once

#include <executorch/runtime/core/data_loader.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>

namespace runner {

/// XNNPACK copies every weight into a layout of its own and then frees what it read. Until then mapped pages count as
/// this process's memory: 263 MB while the head of a 1B model is packed. So until keep() a thread releases them again
/// and again; a later read gets them back from the page cache.
class Loader final : public executorch::runtime::DataLoader {
 public:
  /// A file that cannot be opened is a load failure.
  explicit Loader(const std::string& path);
  ~Loader() override;

  executorch::runtime::Result<executorch::runtime::FreeableBuffer> load(
      size_t offset, size_t size, const SegmentInfo& info) const override;
  executorch::runtime::Error load_into(size_t offset, size_t size, const SegmentInfo& info, void* buffer) const override;
  executorch::runtime::Result<size_t> size() const override { return size_; }

  /// Stop releasing pages.
  void keep();

 private:
  /// Outlives the loader for as long as buffers are in use.
  struct Mapped {
    std::mutex mutex;
    std::set<std::pair<void*, size_t>> regions;
  };
  struct Region {
    std::shared_ptr<Mapped> mapped;
    void* begin;
    size_t size;
  };
  static void release(void* region, void* data, size_t size);
  void release_pages();

  int file_;
  size_t size_ = 0;
  std::shared_ptr<Mapped> mapped_ = std::make_shared<Mapped>();
  std::mutex mutex_;
  std::condition_variable changed_;
  bool kept_ = false;
  std::thread thread_;
};

}  // namespace runner
