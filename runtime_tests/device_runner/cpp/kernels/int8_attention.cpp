// Attention with int8 operands as tasks over a fixed grid of keys.
#include <algorithm>
#include <cmath>

#include "int8_tile.h"

namespace runner {
namespace {

constexpr int64_t kGrid = 512;              // keys of a softmax of its own, at every row's same positions
constexpr int64_t kRowsOfTile = 48;         // rows that share a block of keys while it is unpacked
constexpr int64_t kTasksOfThread = 2;       // so that threads end together
constexpr int64_t kSerialWork = 256 * 1024;  // multiply-adds, some 16 µs: a second thread costs more than it saves

Int8Tile tile_function(Isa isa, int64_t head_dim) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512_vnni && head_dim % 16 == 0) return int8_tile_avx512_vnni;
  if (isa >= Isa::avx2 && head_dim % 8 == 0) return int8_tile_avx2;
  if (head_dim % 8 == 0) return int8_tile_baseline;
#elif defined(__aarch64__)
  if (head_dim % 16 == 0) return isa == Isa::dotprod ? int8_tile_dotprod : int8_tile_baseline;
#endif
  return int8_tile_portable;
}

/// How a call is cut. Rows may be cut in any way, since each depends on its own position only; keys only by the grid.
struct Cut {
  int64_t groups, group_blocks, queries, query_blocks, row_blocks, rows, splits;
  bool by_keys;  // ranges of keys are tasks too
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Cut cut(const Shape& call, size_t threads) {
  Cut c = {};
  const int64_t share = call.heads / call.groups;
  c.splits = ceil_div(call.seen(call.new_tokens - 1), kGrid);
  c.queries = std::min(call.new_tokens, std::max<int64_t>(1, kRowsOfTile / share));
  c.query_blocks = ceil_div(call.new_tokens, c.queries);
  // A decode step is bound by memory: its tiles take as many groups as leave every thread its tasks, for a tile of one
  // group reads a line here and there, and keeps few of them in the nearest cache.
  const int64_t wanted = threads == 1 ? 1 : kTasksOfThread * static_cast<int64_t>(threads);
  c.groups = call.new_tokens == 1 ? ceil_div(call.groups, std::min(call.groups, ceil_div(wanted, c.splits))) : 1;
  c.group_blocks = ceil_div(call.groups, c.groups);
  c.row_blocks = c.group_blocks * c.query_blocks;
  c.rows = c.groups * c.queries * share;
  c.by_keys = threads > 1 && c.splits > 1 && c.row_blocks < wanted;
  return c;
}

/// Queries of a block and the keys they see, of one split; the heaviest blocks come first.
Tile tile_of(const Shape& call, const Cut& c, int64_t row_block, int64_t split) {
  const int64_t block = c.query_blocks - 1 - row_block / c.group_blocks;
  Tile tile = {};
  tile.group_begin = row_block % c.group_blocks * c.groups;
  tile.group_end = std::min(tile.group_begin + c.groups, call.groups);
  tile.query_begin = block * c.queries;
  tile.query_end = std::min(tile.query_begin + c.queries, call.new_tokens);
  tile.key_begin = split * kGrid;
  tile.key_end = std::min((split + 1) * kGrid, call.seen(tile.query_end - 1));
  return tile;
}

Partial partial_at(int64_t rows, int64_t dim, float* at) { return {at, at + rows * dim, at + rows * (dim + 1)}; }

int64_t partial_floats(const Shape& call, const Cut& c) {
  return ceil_div(c.rows * (call.head_dim + 2), kLine) * kLine;
}

/// Adds the keys of `part`, which follow those of `into`: both are scaled to their common maximum.
void fold(int64_t rows, int64_t dim, const Partial& into, const Partial& part) {
  for (int64_t row = 0; row < rows; ++row) {
    const float maximum = std::max(into.maxima[row], part.maxima[row]);
    const float before = std::exp2(into.maxima[row] - maximum), now = std::exp2(part.maxima[row] - maximum);
    into.maxima[row] = maximum;
    into.weights[row] = into.weights[row] * before + part.weights[row] * now;
    float* to = into.sums + row * dim;
    for (int64_t d = 0; d < dim; ++d) to[d] = to[d] * before + part.sums[row * dim + d] * now;
  }
}

/// The rows' results: sums divided by the total weight, which is the softmax's denominator.
void finish(const Shape& call, const Tile& tile, const Partial& whole, float* out) {
  const int64_t share = call.heads / call.groups, dim = call.head_dim, of_group = group_rows(call, tile);
  for (int64_t row = 0; row < tile_rows(call, tile); ++row) {
    const int64_t query = tile.query_begin + row % of_group / share;
    const int64_t head = (tile.group_begin + row / of_group) * share + row % share;
    float* to = out + (query * call.heads + head) * dim;
    for (int64_t d = 0; d < dim; ++d) to[d] = whole.sums[row * dim + d] / whole.weights[row];
  }
}

}  // namespace

void attend_int8(const Int8Attention& call, Isa isa, const Parallel& parallel) {
  const int64_t work = call.new_tokens * call.heads * call.seen(call.new_tokens - 1) * call.head_dim;
  const size_t threads = work < kSerialWork ? 1 : parallel.threads;
  const Cut c = cut(call, threads);
  const Int8Tile attend_tile = tile_function(isa, call.head_dim);
  const int64_t dim = call.head_dim, size = partial_floats(call, c), room = int8_scratch(call, c.rows);
  const int64_t tasks = c.by_keys ? c.row_blocks * c.splits : c.row_blocks;
  float* shared = c.by_keys ? scratch<Scratch::call>(tasks * size) : nullptr;
  const auto part = [&](int64_t row_block, int64_t split, float* at) {
    float* own = scratch<Scratch::task>(room + 2 * size) + 2 * size;
    attend_tile(call, tile_of(call, c, row_block, split), partial_at(c.rows, dim, at), own);
  };
  const auto folded = [&](int64_t row_block, float* into, float* at) {
    const int64_t rows = tile_rows(call, tile_of(call, c, row_block, 0));
    fold(rows, dim, partial_at(c.rows, dim, into), partial_at(c.rows, dim, at));
  };
  const auto task = [&](size_t index) {
    if (c.by_keys) return part(index / c.splits, index % c.splits, shared + index * size);
    float* whole = scratch<Scratch::task>(room + 2 * size);
    for (int64_t s = 0; s < c.splits; ++s) {
      part(index, s, s == 0 ? whole : whole + size);
      if (s > 0) folded(index, whole, whole + size);
    }
    finish(call, tile_of(call, c, index, 0), partial_at(c.rows, dim, whole), call.out);
  };
  if (threads == 1) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
  } else {
    parallel.run(task, tasks);
  }
  if (!c.by_keys) return;
  for (int64_t block = 0; block < c.row_blocks; ++block) {
    float* parts = shared + block * c.splits * size;
    for (int64_t s = 1; s < c.splits; ++s) folded(block, parts, parts + s * size);
    finish(call, tile_of(call, c, block, 0), partial_at(c.rows, dim, parts), call.out);
  }
}

}  // namespace runner
