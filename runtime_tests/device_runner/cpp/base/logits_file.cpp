#include "logits_file.h"

#include <cerrno>
#include <cstring>

#include "checksums.h"
#include "error.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "floats are written as they lie in memory");

namespace runner {

LogitsFile::LogitsFile(const std::string& path) : path_(path), file_(std::fopen(path.c_str(), "wb"), std::fclose) {
  if (!file_) fail();
}

void LogitsFile::append(const float* values, size_t count) {
  if (std::fwrite(values, sizeof(float), count, file_.get()) != count) fail();
  crc_ = runner::crc32(crc_, values, count * sizeof(float));
  ++rows_;
}

void LogitsFile::close() {
  if (std::fclose(file_.release()) != 0) fail();
}

std::string LogitsFile::crc32() const {
  char digits[9];
  std::snprintf(digits, sizeof digits, "%08x", crc_);
  return digits;
}

void LogitsFile::fail() const { throw Failure(Stage::run, "cannot write " + path_ + ": " + std::strerror(errno)); }

}  // namespace runner
