// The file that `logits` appends to, with a checksum of everything written.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>

namespace runner {

/// Rows of float32, little-endian.
class LogitsFile {
 public:
  explicit LogitsFile(const std::string& path);
  void append(const float* values, size_t count);
  /// Flush and close; a run failure if not everything could be written.
  void close();
  int64_t rows() const { return rows_; }
  /// CRC-32 (that of zlib and PNG) of all bytes, eight hexadecimal digits.
  std::string crc32() const;

 private:
  [[noreturn]] void fail() const;

  std::string path_;
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file_;
  int64_t rows_ = 0;
  uint32_t crc_ = 0;
};

}  // namespace runner
