// The inner part of attention with int8 operands. Compiled once for each instruction set.
#pragma once

#include "attention_tile.h"

namespace runner {

/// Keys that are unpacked at once, so that they stay in the nearest cache.
constexpr int64_t kInt8Block = 64;

/// Fills `partial`. `scratch` holds int8_scratch() floats and is aligned to 64 bytes.
using Int8Tile = void (*)(const Int8Attention& call, const Tile& tile, const Partial& partial, float* scratch);

/// Floats, or words of their size, of scratch: the rows' queries [M, D] with three numbers each, a block of keys [D, keys]
/// with five numbers each, one of values [keys, D], and the scores of the rows in process.
inline int64_t int8_scratch(const Shape& call, int64_t rows) {
  return rows * (call.head_dim + 3) + kInt8Block * (2 * call.head_dim + 5) + kMostRows * kKeyBlock;
}

/// For every head_dim; the others are for its multiples of 16, those for x86 without VNNI of 8.
void int8_tile_portable(const Int8Attention&, const Tile&, const Partial&, float* scratch);
void int8_tile_baseline(const Int8Attention&, const Tile&, const Partial&, float* scratch);
void int8_tile_avx2(const Int8Attention&, const Tile&, const Partial&, float* scratch);
void int8_tile_avx512_vnni(const Int8Attention&, const Tile&, const Partial&, float* scratch);
void int8_tile_dotprod(const Int8Attention&, const Tile&, const Partial&, float* scratch);

}  // namespace runner
