// Checksums of bytes and of files.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace runner {

/// The CRC-32 of zlib and PNG, continued from that of the bytes before; it begins as 0.
uint32_t crc32(uint32_t crc, const void* data, size_t count);

using Sha256 = std::array<uint8_t, 32>;

/// SHA-256 (FIPS 180-4) of some bytes.
Sha256 sha256(const std::string& bytes);

}  // namespace runner
