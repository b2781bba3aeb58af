// The inner part of attention: rows of queries against a range of keys. Compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "attention.h"

namespace runner {

/// Queries [query_begin, query_end) of every head of groups [group_begin, group_end), against keys [key_begin, key_end).
struct Tile {
  int64_t group_begin, group_end, query_begin, query_end, key_begin, key_end;
};

/// Keys whose scores are held at once.
constexpr int64_t kKeyBlock = 128;

/// A softmax over a part of the keys. Rows are (group, query, head of the group), heads fastest: M of them.
struct Partial {
  float* sums;     // [M, D]  Σ 2^(score - maximum) · value
  float* maxima;   // [M]     in units of log2
  float* weights;  // [M]     Σ 2^(score - maximum)
};

/// Fills `partial`. `scratch` holds tile_scratch() floats.
template <class Number>
using AttendTile = void (*)(const Attention<Number>& call, const Tile& tile, const Partial& partial, float* scratch);

/// Rows of one group in a tile.
inline int64_t group_rows(const Shape& call, const Tile& tile) {
  return (tile.query_end - tile.query_begin) * (call.heads / call.groups);
}

/// Rows of a tile.
inline int64_t tile_rows(const Shape& call, const Tile& tile) {
  return (tile.group_end - tile.group_begin) * group_rows(call, tile);
}

/// Most rows that are processed at once.
constexpr int64_t kMostRows = 4;

/// Floats of scratch: scaled queries [M, D], the scores of the rows in process, [kMostRows, kKeyBlock], and a block of
/// bfloat16 keys and values as float32, [2, kKeyBlock, D].
inline int64_t tile_scratch(const Shape& call, int64_t rows) {
  return (rows + 2 * kKeyBlock) * call.head_dim + kMostRows * kKeyBlock;
}

void attend_tile_baseline(const Attention<float>&, const Tile&, const Partial&, float* scratch);
void attend_tile_baseline(const Attention<Bfloat16>&, const Tile&, const Partial&, float* scratch);
void attend_tile_avx2(const Attention<float>&, const Tile&, const Partial&, float* scratch);
void attend_tile_avx2(const Attention<Bfloat16>&, const Tile&, const Partial&, float* scratch);
void attend_tile_avx512(const Attention<float>&, const Tile&, const Partial&, float* scratch);
void attend_tile_avx512(const Attention<Bfloat16>&, const Tile&, const Partial&, float* scratch);

}  // namespace runner
