// One source for every instruction set: vectors of the compiler, as wide as the flags of this compilation allow.
// ATTEND_TILE names the function. Only plain loops and no standard templates: the linker could choose an inline function
// of the standard library that was compiled here with AVX for the whole program.
#include "attention_tile.h"

namespace runner {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 2;  // 16 registers: 2 × 4 accumulators and their operands
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 4;  // 32 registers
#else
constexpr int kLanes = 4, kRows = 2;
#endif
constexpr int64_t kAhead = 16;  // positions that are prefetched ahead
constexpr int kColumns = 4;  // vectors of a row, or keys, processed at once

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Four __attribute__((vector_size(16)));
typedef float Unaligned __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef float UnalignedFour __attribute__((vector_size(16), aligned(4), may_alias));

constexpr float kLowest = -3.4e38F;  // finite: a row that has seen no key yet subtracts it without making a NaN
constexpr float kLog2E = 1.44269504F;

inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }
inline Vector all(float value) { return value - Vector{}; }
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

// add_pairs: within every four lanes the sums of neighbours, first those of a, then those of b. fold: the fours added up.
#if defined(__AVX512F__)
typedef float Eight __attribute__((vector_size(32)));
inline Vector add_pairs(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}
inline Four fold(Vector v) {
  const Eight low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  const Eight half = low + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
}
#elif defined(__AVX2__)
inline Vector add_pairs(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}
inline Four fold(Vector v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
#else
inline Vector add_pairs(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
}
inline Four fold(Vector v) { return v; }
#endif

/// The sum of each of four vectors.
inline Four sums_of(const Vector v[kColumns]) {
  return fold(add_pairs(add_pairs(v[0], v[1]), add_pairs(v[2], v[3])));
}

inline float maximum_of(Vector v) {
  float highest = v[0];
  for (int i = 1; i < kLanes; ++i) highest = v[i] > highest ? v[i] : highest;
  return highest;
}

inline float sum_of(Vector v) {
  const Four folded = fold(v);
  return (folded[0] + folded[1]) + (folded[2] + folded[3]);
}

/// 2^x for x <= 0, to float precision; 0 below 2^-126. Taylor series of 2^f with |f| <= 1/2, shifted into place.
inline Vector exp2_of(Vector x) {
  const Vector magic = all(12582912.0F);  // 1.5 · 2^23: adding it rounds to an integer
  const Vector in_range = larger(x, all(-126.0F));
  const Vector whole = (in_range + magic) - magic;
  const Vector f = in_range - whole;
  Vector p = all(1.52527338e-5F);
  p = p * f + 1.54035304e-4F;
  p = p * f + 1.33335581e-3F;
  p = p * f + 9.61812911e-3F;
  p = p * f + 5.55041087e-2F;
  p = p * f + 2.40226507e-1F;
  p = p * f + 6.93147181e-1F;
  p = p * f + 1.0F;
  const Integers exponent = (__builtin_convertvector(whole, Integers) + 127) << 23;
  Vector power;
  __builtin_memcpy(&power, &exponent, sizeof power);
  return x < all(-126.0F) ? Vector{} : p * power;
}

/// Scores of R rows against four keys that are `key_stride` floats apart; past the first `present` the last is repeated.
template <int R>
inline void score_four(
    const float* query, const float* key, int64_t key_stride, int64_t present, int64_t head_dim, float* scores) {
  const float* keys[kColumns];
  for (int j = 0; j < kColumns; ++j) keys[j] = key + (j < present ? j : present - 1) * key_stride;
  Vector sums[R][kColumns] = {};
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    Vector k[kColumns];
    for (int j = 0; j < kColumns; ++j) k[j] = load(keys[j] + d);
    for (int j = 0; j < kColumns; ++j) __builtin_prefetch(keys[j] + kAhead * key_stride + d);
    for (int r = 0; r < R; ++r) {
      const Vector q = load(query + r * head_dim + d);
      for (int j = 0; j < kColumns; ++j) sums[r][j] += q * k[j];
    }
  }
  for (int r = 0; r < R; ++r) *reinterpret_cast<UnalignedFour*>(scores + r * kKeyBlock) = sums_of(sums[r]);
}

/// sums[R, D] += p[R, keys] · value[keys, D] for N vectors of each row.
template <int R, int N>
inline void add_columns(
    const float* p, const float* value, int64_t value_stride, int64_t keys, int64_t head_dim, float* sums) {
  Vector total[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) total[r][n] = load(sums + r * head_dim + n * kLanes);
  for (int64_t j = 0; j < keys; ++j) {
    Vector v[N];
    for (int n = 0; n < N; ++n) v[n] = load(value + j * value_stride + n * kLanes);
    for (int n = 0; n < N; ++n) __builtin_prefetch(value + (j + kAhead) * value_stride + n * kLanes);
    for (int r = 0; r < R; ++r) {
      const float weight = p[r * kKeyBlock + j];
      for (int n = 0; n < N; ++n) total[r][n] += weight * v[n];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(sums + r * head_dim + n * kLanes, total[r][n]);
}

/// Key and value rows of one block, of one group.
struct Block {
  const float* key;
  const float* value;
  int64_t stride, keys;
};

/// One step of an online softmax: turns a row of scores into weights 2^(score - new maximum). Returns 2^(old maximum -
/// new maximum), by which the sums of earlier blocks must be multiplied.
inline float softmax_row(float* scores, int64_t keys, float* maximum, float* weight) {
  int64_t padded = keys;
  for (; padded % kLanes != 0; ++padded) scores[padded] = -__builtin_inff();
  Vector highest = all(*maximum);
  for (int64_t j = 0; j < padded; j += kLanes) highest = larger(highest, load(scores + j));
  const float now = maximum_of(highest);
  Vector total = {};
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Vector p = exp2_of(load(scores + j) - now);
    store(scores + j, p);
    total += p;
  }
  const float factor = exp2_of(all(*maximum - now))[0];
  *maximum = now;
  *weight = *weight * factor + sum_of(total);
  return factor;
}

/// R rows, beginning with `row`, through one block.
template <int R>
inline void attend_rows(
    const Block& block, const int64_t* visible, int64_t head_dim, const float* query, float* scores, float* sums,
    float* maxima, float* weights) {
  for (int64_t j = 0; j < block.keys; j += kColumns)
    score_four<R>(query, block.key + j * block.stride, block.stride, block.keys - j, head_dim, scores + j);
  for (int r = 0; r < R; ++r) {
    float* row = scores + r * kKeyBlock;
    for (int64_t j = visible[r] < 0 ? 0 : visible[r]; j < block.keys; ++j) row[j] = -__builtin_inff();
    const float factor = softmax_row(row, block.keys, maxima + r, weights + r);
    if (factor != 1.0F)
      for (int64_t d = 0; d < head_dim; d += kLanes)
        store(sums + r * head_dim + d, load(sums + r * head_dim + d) * factor);
  }
  int64_t d = 0;
  for (; d + kColumns * kLanes <= head_dim; d += kColumns * kLanes)
    add_columns<R, kColumns>(scores, block.value + d, block.stride, block.keys, head_dim, sums + d);
  for (; d < head_dim; d += kLanes)
    add_columns<R, 1>(scores, block.value + d, block.stride, block.keys, head_dim, sums + d);
}

/// Queries of the tile's rows, scaled so that the softmax can use powers of two.
inline void gather_queries(const Attention& call, const Tile& tile, float* to) {
  const int64_t share = call.heads / call.groups, length = share * call.head_dim;
  for (int64_t group = tile.group_begin; group < tile.group_end; ++group)
    for (int64_t i = tile.query_begin; i < tile.query_end; ++i) {
      const float* from = call.query + (i * call.heads + group * share) * call.head_dim;
      for (int64_t d = 0; d < length; ++d) *to++ = from[d] * (call.scale * kLog2E);
    }
}

constexpr decltype(&attend_rows<1>) kAttendRows[] = {attend_rows<1>, attend_rows<2>, attend_rows<3>, attend_rows<4>};

/// The rows of one group, the first of which is `first`, through one block of keys that begins with `begin`.
inline void attend_group(
    const Attention& call, const Tile& tile, const Block& block, int64_t begin, int64_t first, const float* queries,
    float* scores, const Partial& partial) {
  const int64_t rows = group_rows(call, tile), share = call.heads / call.groups, dim = call.head_dim;
  for (int64_t row = 0; row < rows;) {
    const int64_t taken = rows - row < kRows ? rows - row : kRows;
    int64_t visible[kRows];  // keys of this block up to the query's own position
    for (int64_t r = 0; r < taken; ++r) visible[r] = call.start + tile.query_begin + (row + r) / share + 1 - begin;
    const int64_t at = first + row;
    kAttendRows[taken - 1](
        block, visible, dim, queries + at * dim, scores, partial.sums + at * dim, partial.maxima + at,
        partial.weights + at);
    row += taken;
  }
}

}  // namespace

void ATTEND_TILE(const Attention& call, const Tile& tile, const Partial& partial, float* scratch) {
  const int64_t rows = tile_rows(call, tile), dim = call.head_dim, stride = call.groups * dim;
  float* queries = scratch;
  float* scores = scratch + rows * dim;
  gather_queries(call, tile, queries);
  for (int64_t i = 0; i < rows * dim; ++i) partial.sums[i] = 0.0F;
  for (int64_t i = 0; i < rows; ++i) partial.maxima[i] = kLowest, partial.weights[i] = 0.0F;
  for (int64_t begin = tile.key_begin; begin < tile.key_end; begin += kKeyBlock) {
    const int64_t left = tile.key_end - begin, keys = left < kKeyBlock ? left : kKeyBlock;
    for (int64_t group = tile.group_begin; group < tile.group_end; ++group) {
      const int64_t at = begin * stride + group * dim, first = (group - tile.group_begin) * group_rows(call, tile);
      attend_group(call, tile, {call.key + at, call.value + at, stride, keys}, begin, first, queries, scores, partial);
    }
  }
}

}  // namespace runner
