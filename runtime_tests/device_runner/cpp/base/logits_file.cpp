#include "logits_file.h"

#include <array>
#include <cerrno>
#include <cstring>

#include "error.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "floats are written as they lie in memory");

namespace runner {
namespace {

constexpr size_t kSlices = 8;
using Tables = std::array<std::array<uint32_t, 256>, kSlices>;

/// tables[k][b]: the CRC of byte b followed by k zero bytes.
constexpr Tables make_tables() {
  Tables tables = {};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t crc = b;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1U ? 0xEDB88320U : 0U);
    tables[0][b] = crc;
  }
  for (size_t k = 1; k < kSlices; ++k)
    for (size_t b = 0; b < 256; ++b)
      tables[k][b] = (tables[k - 1][b] >> 8) ^ tables[0][tables[k - 1][b] & 0xFFU];
  return tables;
}

constexpr Tables kTables = make_tables();

uint32_t crc32_of(uint32_t crc, const unsigned char* bytes, size_t count) {
  crc = ~crc;
  for (; count >= kSlices; bytes += kSlices, count -= kSlices) {
    uint64_t word;
    std::memcpy(&word, bytes, sizeof word);
    word ^= crc;
    crc = 0;
    for (size_t k = 0; k < kSlices; ++k) crc ^= kTables[kSlices - 1 - k][(word >> (8 * k)) & 0xFFU];
  }
  for (; count > 0; ++bytes, --count) crc = (crc >> 8) ^ kTables[0][(crc ^ *bytes) & 0xFFU];
  return ~crc;
}

}  // namespace

LogitsFile::LogitsFile(const std::string& path) : path_(path), file_(std::fopen(path.c_str(), "wb"), std::fclose) {
  if (!file_) fail();
}

void LogitsFile::append(const float* values, size_t count) {
  if (std::fwrite(values, sizeof(float), count, file_.get()) != count) fail();
  crc_ = crc32_of(crc_, reinterpret_cast<const unsigned char*>(values), count * sizeof(float));
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
