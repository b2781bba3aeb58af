// Attention as tasks, and the merging of their partial results.
#include "attention.h"

#include <algorithm>
#include <cmath>

#include "attention_tile.h"

namespace runner {
namespace {

constexpr int64_t kRowsOfTile = 48;         // rows that share a block of keys while it is in the cache
constexpr int64_t kSplit = 48;              // fewest keys worth a task of their own
constexpr int64_t kTasks = 16;              // enough for the threads of a phone to end together
constexpr int64_t kSerialWork = 32 * 1024;  // multiply-adds below which a second thread costs more than it saves

template <class Number>
AttendTile<Number> tile_function(Isa isa, int64_t head_dim) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512 && head_dim % 16 == 0) return attend_tile_avx512;
  if (isa != Isa::baseline && head_dim % 8 == 0) return attend_tile_avx2;
#endif
  (void)isa, (void)head_dim;
  return attend_tile_baseline;
}

/// How a call is cut: by groups, blocks of queries and, where these are few, ranges of keys. It does not depend on the
/// number of threads, so that they do not change the result.
struct Cut {
  int64_t groups, group_blocks, queries, query_blocks, keys, splits;
  int64_t rows, row_blocks;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Cut cut(const Shape& call) {
  Cut c = {};
  const int64_t share = call.heads / call.groups, visible = call.seen(call.new_tokens - 1);
  c.queries = std::min(call.new_tokens, std::max<int64_t>(1, kRowsOfTile / share));
  c.query_blocks = ceil_div(call.new_tokens, c.queries);
  // A decode step is bound by memory: its tiles take all groups, so that each reads whole positions in sequence.
  c.groups = call.new_tokens == 1 ? call.groups : 1;
  c.group_blocks = call.groups / c.groups;
  c.rows = c.groups * c.queries * share;
  c.row_blocks = c.group_blocks * c.query_blocks;
  c.splits = std::clamp<int64_t>(visible / kSplit, 1, ceil_div(kTasks, c.row_blocks));
  c.keys = ceil_div(visible, c.splits);
  c.splits = ceil_div(visible, c.keys);
  return c;
}

/// Queries of a block and the keys they see, of one split; the heaviest blocks come first.
Tile tile_of(const Shape& call, const Cut& c, int64_t row_block, int64_t split) {
  const int64_t block = c.query_blocks - 1 - row_block / c.group_blocks;
  Tile tile = {};
  tile.group_begin = row_block % c.group_blocks * c.groups;
  tile.group_end = tile.group_begin + c.groups;
  tile.query_begin = block * c.queries;
  tile.query_end = std::min(tile.query_begin + c.queries, call.new_tokens);
  tile.key_begin = split * c.keys;
  tile.key_end = std::min((split + 1) * c.keys, call.seen(tile.query_end - 1));
  return tile;
}

int64_t partial_floats(const Shape& call, const Cut& c) { return c.rows * (call.head_dim + 2); }

Partial partial_at(const Shape& call, const Cut& c, float* at) {
  return {at, at + c.rows * call.head_dim, at + c.rows * (call.head_dim + 1)};
}

/// The rows' results: every split saw some of the keys and scaled its sums by its own maximum, so all are scaled to the
/// common maximum, added, and divided by the total weight, which is the softmax's denominator.
void finish(const Shape& call, const Cut& c, const Tile& tile, const float* parts, float* out) {
  const int64_t share = call.heads / call.groups, dim = call.head_dim, size = partial_floats(call, c);
  const int64_t rows = tile_rows(call, tile), maxima = c.rows * dim, weights = maxima + c.rows;
  const int64_t of_group = group_rows(call, tile);
  for (int64_t row = 0; row < rows; ++row) {
    float maximum = parts[maxima + row], weight = 0.0F;
    for (int64_t s = 1; s < c.splits; ++s) maximum = std::max(maximum, parts[s * size + maxima + row]);
    const int64_t query = tile.query_begin + row % of_group / share;
    const int64_t head = (tile.group_begin + row / of_group) * share + row % share;
    float* to = out + (query * call.heads + head) * dim;
    std::fill(to, to + dim, 0.0F);
    for (int64_t s = 0; s < c.splits; ++s) {
      const float* part = parts + s * size;
      const float factor = std::exp2(part[maxima + row] - maximum);
      weight += part[weights + row] * factor;
      for (int64_t d = 0; d < dim; ++d) to[d] += part[row * dim + d] * factor;
    }
    for (int64_t d = 0; d < dim; ++d) to[d] /= weight;
  }
}

template <class Number>
void attend_in_tiles(const Attention<Number>& call, Isa isa, const Parallel& parallel) {
  const Cut c = cut(call);
  const AttendTile<Number> attend_tile = tile_function<Number>(isa, call.head_dim);
  const int64_t tasks = c.row_blocks * c.splits, size = partial_floats(call, c);
  float* shared = c.splits > 1 ? scratch<Scratch::call>(tasks * size) : nullptr;
  const auto task = [&](size_t index) {
    const int64_t row_block = static_cast<int64_t>(index) / c.splits, split = static_cast<int64_t>(index) % c.splits;
    const Tile tile = tile_of(call, c, row_block, split);
    float* room = scratch<Scratch::task>(tile_scratch(call, c.rows) + size);
    float* parts = c.splits > 1 ? shared + index * size : room + tile_scratch(call, c.rows);
    attend_tile(call, tile, partial_at(call, c, parts), room);
    if (c.splits == 1) finish(call, c, tile, parts, call.out);
  };
  const int64_t work = call.new_tokens * call.heads * call.seen(call.new_tokens - 1) * call.head_dim;
  if (work < kSerialWork || parallel.threads == 1) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
  } else {
    parallel.run(task, tasks);
  }
  if (c.splits == 1) return;
  for (int64_t block = 0; block < c.row_blocks; ++block)
    finish(call, c, tile_of(call, c, block, 0), shared + block * c.splits * size, call.out);
}

}  // namespace

void attend(const Attention<float>& call, Isa isa, const Parallel& parallel) { attend_in_tiles(call, isa, parallel); }
void attend(const Attention<Bfloat16>& call, Isa isa, const Parallel& parallel) { attend_in_tiles(call, isa, parallel); }

}  // namespace runner
