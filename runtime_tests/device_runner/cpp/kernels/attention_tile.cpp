// One source for every instruction set; ATTEND_TILE names the function.
#include "attention_tile.h"
#include "vectors.h"

namespace runner {
namespace {

/// Positions that are prefetched ahead. What is read in halves takes longer to compute with than to load: early is better,
/// up to what the second cache of a small processor holds.
template <class Number>
constexpr int kAhead = sizeof(Number) < sizeof(float) ? kKeyBlock : 16;

/// Scores of R rows against four keys that are `key_stride` apart; past the first `present` the last is repeated.
template <int R, int Ahead, class Number>
inline void score_four(
    const float* query, const Number* key, int64_t key_stride, int64_t present, int64_t head_dim, float* scores) {
  const Number* keys[kColumns];
  for (int j = 0; j < kColumns; ++j) keys[j] = key + (j < present ? j : present - 1) * key_stride;
  Vector sums[R][kColumns] = {};
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    Vector k[kColumns];
    for (int j = 0; j < kColumns; ++j) k[j] = load(keys[j] + d);
    if (Ahead > 0 && d * sizeof(Number) % 64 == 0)  // one for each cache line
      for (int j = 0; j < kColumns; ++j) __builtin_prefetch(keys[j] + Ahead * key_stride + d);
    for (int r = 0; r < R; ++r) {
      const Vector q = load(query + r * head_dim + d);
      for (int j = 0; j < kColumns; ++j) sums[r][j] += q * k[j];
    }
  }
  for (int r = 0; r < R; ++r) *reinterpret_cast<UnalignedFour*>(scores + r * kKeyBlock) = sums_of(sums[r]);
}

/// Key and value rows of one block, of one group.
template <class Number>
struct Block {
  const Number* key;
  const Number* value;
  int64_t stride, keys;
};

/// R rows, beginning with `row`, through one block.
template <int R, int Ahead, class Number>
inline void attend_rows(
    const Block<Number>& block, const Sight* sights, int64_t head_dim, const float* query, float* scores, float* sums,
    float* maxima, float* weights) {
  for (int64_t j = 0; j < block.keys; j += kColumns)
    score_four<R, Ahead>(query, block.key + j * block.stride, block.stride, block.keys - j, head_dim, scores + j);
  const Values<Number> value = {block.value, block.stride, nullptr, nullptr};
  weigh<R, Ahead>(scores, sights, block.keys, value, head_dim, sums, maxima, weights);
}

/// Queries of the tile's rows, scaled so that the softmax can use powers of two.
template <class Number>
inline void gather_queries(const Attention<Number>& call, const Tile& tile, float* to) {
  const int64_t share = call.heads / call.groups, length = share * call.head_dim;
  for (int64_t group = tile.group_begin; group < tile.group_end; ++group)
    for (int64_t i = tile.query_begin; i < tile.query_end; ++i) {
      const float* from = call.query + (i * call.heads + group * share) * call.head_dim;
      for (int64_t d = 0; d < length; ++d) *to++ = from[d] * (call.scale * kLog2E);
    }
}

/// The rows of one group, the first of which is `first`, through one block of keys that begins with `begin`.
template <int Ahead, class Number>
inline void attend_group(
    const Shape& call, const Tile& tile, const Block<Number>& block, int64_t begin, int64_t first, const float* queries,
    float* scores, const Partial& partial) {
  constexpr decltype(&attend_rows<1, Ahead, Number>) kAttendRows[] = {
      attend_rows<1, Ahead, Number>, attend_rows<2, Ahead, Number>, attend_rows<3, Ahead, Number>,
      attend_rows<4, Ahead, Number>};
  const int64_t rows = group_rows(call, tile), share = call.heads / call.groups, dim = call.head_dim;
  for (int64_t row = 0; row < rows;) {
    const int64_t taken = rows - row < kRows ? rows - row : kRows;
    Sight sights[kRows];
    for (int64_t r = 0; r < taken; ++r) sights[r] = sight_of(call, tile.query_begin + (row + r) / share, begin);
    const int64_t at = first + row;
    kAttendRows[taken - 1](
        block, sights, dim, queries + at * dim, scores, partial.sums + at * dim, partial.maxima + at,
        partial.weights + at);
    row += taken;
  }
}

/// The block in float32, [keys, D] each.
template <class Number>
inline Block<float> widened(const Block<Number>& block, int64_t dim, float* room) {
  float *keys = room, *values = room + block.keys * dim;
  for (int64_t j = 0; j < block.keys; ++j)
    for (int64_t d = 0; d < dim; d += kLanes) {
      store(keys + j * dim + d, load(block.key + j * block.stride + d));
      store(values + j * dim + d, load(block.value + j * block.stride + d));
    }
  return {keys, values, dim, block.keys};
}

template <class Number>
inline void attend_tile(const Attention<Number>& call, const Tile& tile, const Partial& partial, float* scratch) {
  const int64_t rows = tile_rows(call, tile), dim = call.head_dim, stride = call.groups * dim;
  float *queries = scratch, *scores = queries + rows * dim, *room = scores + kMostRows * kKeyBlock;
  gather_queries(call, tile, queries);
  for (int64_t i = 0; i < rows * dim; ++i) partial.sums[i] = 0.0F;
  for (int64_t i = 0; i < rows; ++i) partial.maxima[i] = kLowest, partial.weights[i] = 0.0F;
  for (int64_t begin = tile.key_begin; begin < tile.key_end; begin += kKeyBlock) {
    const int64_t left = tile.key_end - begin, keys = left < kKeyBlock ? left : kKeyBlock;
    for (int64_t group = tile.group_begin; group < tile.group_end; ++group) {
      const int64_t at = begin * stride + group * dim, first = (group - tile.group_begin) * group_rows(call, tile);
      const Block<Number> block = {call.key + at, call.value + at, stride, keys};
      if (sizeof(Number) < sizeof(float) && group_rows(call, tile) > kMostRows)  // fewer rows convert as they go
        attend_group<0>(call, tile, widened(block, dim, room), begin, first, queries, scores, partial);
      else
        attend_group<kAhead<Number>>(call, tile, block, begin, first, queries, scores, partial);
    }
  }
}

}  // namespace

void ATTEND_TILE(const Attention<float>& call, const Tile& tile, const Partial& partial, float* scratch) {
  attend_tile(call, tile, partial, scratch);
}

void ATTEND_TILE(const Attention<Bfloat16>& call, const Tile& tile, const Partial& partial, float* scratch) {
  attend_tile(call, tile, partial, scratch);
}

}  // namespace runner
