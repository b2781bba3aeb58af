#include "loader.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>

#include "base/error.h"

namespace runner {

using executorch::runtime::Error;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::Result;

namespace {

constexpr std::chrono::milliseconds kPause(2);

size_t page_size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

Loader::Loader(const std::string& path) : file_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  struct stat status {};
  if (file_ < 0 || fstat(file_, &status) != 0 || !S_ISREG(status.st_mode)) {
    const std::string why = file_ < 0 ? std::strerror(errno) : "not a file";
    if (file_ >= 0) close(file_);
    throw Failure(Stage::load, "cannot load " + path + ": " + why);
  }
  size_ = static_cast<size_t>(status.st_size);
  thread_ = std::thread([this] { release_pages(); });
}

Loader::~Loader() {
  keep();
  close(file_);
}

Result<FreeableBuffer> Loader::load(size_t offset, size_t size, const SegmentInfo&) const {
  if (offset > size_ || size > size_ - offset) return Error::InvalidArgument;
  if (size == 0) return FreeableBuffer(nullptr, 0, nullptr);
  const size_t before = offset % page_size();
  void* begin = mmap(nullptr, size + before, PROT_READ, MAP_PRIVATE, file_, static_cast<off_t>(offset - before));
  if (begin == MAP_FAILED) return Error::AccessFailed;
  const std::lock_guard<std::mutex> lock(mapped_->mutex);
  mapped_->regions.emplace(begin, size + before);
  return FreeableBuffer(
      static_cast<char*>(begin) + before, size, &Loader::release, new Region{mapped_, begin, size + before});
}

Error Loader::load_into(size_t offset, size_t size, const SegmentInfo&, void* buffer) const {
  if (offset > size_ || size > size_ - offset) return Error::InvalidArgument;
  for (size_t done = 0; done < size;) {
    const ssize_t got = pread(file_, static_cast<char*>(buffer) + done, size - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return Error::AccessFailed;
    done += static_cast<size_t>(got);
  }
  return Error::Ok;
}

void Loader::release(void* context, void*, size_t) {
  const std::unique_ptr<Region> region(static_cast<Region*>(context));
  // under the lock: once it is unmapped, the same addresses may hold something that must not be released
  const std::lock_guard<std::mutex> lock(region->mapped->mutex);
  region->mapped->regions.erase({region->begin, region->size});
  munmap(region->begin, region->size);
}

void Loader::keep() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Loader::release_pages() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!changed_.wait_for(lock, kPause, [this] { return kept_; })) {
    const std::lock_guard<std::mutex> regions(mapped_->mutex);
    for (const auto& [begin, size] : mapped_->regions) madvise(begin, size, MADV_DONTNEED);
  }
}

}  // namespace runner
