// One source for every instruction set; INT8_TILE names the function.
//
// Keys lie position after position, and a dot product of one query with one key would end with a sum across a vector. So a
// block of keys is transposed first, word by word: then a lane is a key, and every row of queries that shares the block
// uses it as it is. A word holds what the processor multiplies and adds at once: four int8, two int16 or, where head_dim
// is no multiple of theirs, one float. All sums are integers below 2^24, hence exact, in float as well.
#include "int8_tile.h"
#include "vectors.h"

namespace runner {
namespace {

constexpr int kAhead = kInt8Block;  // positions that are prefetched ahead

#if defined(INT8_PORTABLE)
constexpr int kStep = 1;  // dimensions in a word
typedef float Word;
#elif defined(__AVX512VNNI__) || defined(__aarch64__)
constexpr int kStep = 4;
typedef int32_t Word;
#else
constexpr int kStep = 2;
typedef int32_t Word;
#endif
constexpr bool kWhole = kStep < 4;  // words hold value - zero; four int8 hold the value, and zeros are subtracted later
typedef Word Words __attribute__((vector_size(kLanes * 4)));
typedef int64_t Pairs __attribute__((vector_size(kLanes * 4)));  // of words
typedef Word FourWords __attribute__((vector_size(16)));
typedef Word UnalignedWords __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

// dots: of the step's dimensions, added to `sums`. four_words: the next dimensions of a key.
constexpr int kOffset = kStep == 4 && kLanes == 16 ? 128 : 0;  // VNNI takes keys without sign
#if defined(INT8_PORTABLE)
inline Words dots(Words sums, Words key, Words query) { return sums + key * query; }
inline FourWords four_words(const int8_t* key, int zero) {
  return FourWords{float(key[0] - zero), float(key[1] - zero), float(key[2] - zero), float(key[3] - zero)};
}
#elif defined(__AVX512VNNI__)
inline Words dots(Words sums, Words key, Words query) {
  return (Words)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)key, (__m512i)query);
}
inline FourWords four_words(const int8_t* key, int) {
  return (FourWords)_mm_loadu_si128(reinterpret_cast<const __m128i*>(key));
}
#elif defined(__x86_64__)
inline FourWords four_words(const int8_t* key, int zero) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(key));
  const __m128i values = _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
  return (FourWords)_mm_sub_epi16(values, _mm_set1_epi16(static_cast<int16_t>(zero)));
}
#if defined(__AVX2__)
inline Words dots(Words sums, Words key, Words query) {
  return sums + (Words)_mm256_madd_epi16((__m256i)key, (__m256i)query);
}
#else
inline Words dots(Words sums, Words key, Words query) {
  return sums + (Words)_mm_madd_epi16((__m128i)key, (__m128i)query);
}
#endif
#elif defined(__aarch64__)
inline FourWords four_words(const int8_t* key, int) { return (FourWords)vld1q_s8(key); }
#if defined(__ARM_FEATURE_DOTPROD)
inline Words dots(Words sums, Words key, Words query) {
  return (Words)vdotq_s32((int32x4_t)sums, (int8x16_t)key, (int8x16_t)query);
}
#else
inline Words dots(Words sums, Words key, Words query) {
  const auto k = (int8x16_t)key, q = (int8x16_t)query;
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(k), vget_low_s8(q)));
  return sums + (Words)vpaddq_s32(low, vpaddlq_s16(vmull_high_s8(k, q)));
}
#endif
#endif

// joined: FourWords of keys j, j + 4, … side by side, so that transposing the fours leaves the keys in order. FOURS and
// TWOS: a shuffle of words, or of pairs of them, in every four words.
#if defined(__AVX512F__)
typedef Word EightWords __attribute__((vector_size(32)));
inline Words joined(const FourWords* f) {
  const EightWords low = __builtin_shufflevector(f[0], f[4], 0, 1, 2, 3, 4, 5, 6, 7);
  const EightWords high = __builtin_shufflevector(f[8], f[12], 0, 1, 2, 3, 4, 5, 6, 7);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
#define FOURS(a, b, c, d) \
  a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12
#define TWOS(a, b) a, b, a + 2, b + 2, a + 4, b + 4, a + 6, b + 6
#elif defined(__AVX2__)
inline Words joined(const FourWords* f) { return __builtin_shufflevector(f[0], f[4], 0, 1, 2, 3, 4, 5, 6, 7); }
#define FOURS(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4
#define TWOS(a, b) a, b, a + 2, b + 2
#else
inline Words joined(const FourWords* f) { return f[0]; }
#define FOURS(a, b, c, d) a, b, c, d
#define TWOS(a, b) a, b
#endif
#if defined(__AVX512VNNI__)
inline Words with_offset(Words keys) { return keys ^ (static_cast<Word>(0x80808080) - Words{}); }
#else
inline Words with_offset(Words keys) { return keys; }
#endif
constexpr int kB = kLanes;  // where a shuffle's second operand begins

inline Words load_words(const Word* from) { return *reinterpret_cast<const UnalignedWords*>(from); }
inline void store_words(Word* to, Words value) { *reinterpret_cast<UnalignedWords*>(to) = value; }

/// A block of keys of one group, transposed, and what belongs to their values.
struct Block {
  Word* keys;    // [D / kStep, kInt8Block]
  Word* sums;    // [kInt8Block] of the words' parts, where zeros are subtracted later
  Word* zeros;   // [kInt8Block]
  float* scales;  // [kInt8Block]
  float* value_scales;  // [kInt8Block]
  float* value_zeros;   // [kInt8Block]
  float* values;        // [kInt8Block, D], of many rows: the integers
  int64_t present;      // keys
};

/// Queries of a tile, and what the softmax multiplies scores with so that it can use powers of two.
struct Queries {
  Word* words;     // [M, D / kStep]
  Word* zeros;     // [M]
  Word* sums;      // [M] of value - zero
  float* factors;  // [M]
};

/// A position's place in one group of a cache.
inline int64_t place(const Shape& call, int64_t position, int64_t group) { return position * call.groups + group; }

/// What belongs to a block's keys and values. Of lanes behind the last key, numbers that are finite.
inline void gather_scales(const Int8Attention& call, int64_t begin, int64_t group, const Block& block) {
  const int64_t groups = call.groups, first = place(call, begin, group);
  const int8_t *key_zeros = call.key.zeros + first, *value_zeros = call.value.zeros + first;
  const float *key_scales = call.key.scales + first, *value_scales = call.value.scales + first;
  for (int64_t j = 0; j < block.present; ++j) {
    block.zeros[j] = static_cast<Word>(key_zeros[j * groups] + kOffset);
    block.scales[j] = key_scales[j * groups];
    block.value_scales[j] = value_scales[j * groups];
    block.value_zeros[j] = static_cast<float>(value_zeros[j * groups]);
  }
  for (int64_t j = block.present; j % kLanes != 0; ++j)
    block.zeros[j] = 0, block.scales[j] = 0.0F, block.value_scales[j] = 0.0F, block.value_zeros[j] = 0.0F;
}

/// `count` keys, at most kLanes of them, become the lanes `j` … of the block's words; the last key fills the rest.
template <bool Full>
inline void gather_lanes(
    const int8_t* from, int64_t stride, int64_t dim, int64_t j, int64_t count, const Block& block) {
  const int64_t last = count - 1;
  Words sums = {};
  const Words ones = static_cast<Word>(kStep == 4 ? 0x01010101 : 0) - Words{};
  Word* to = block.keys + j;
  for (int64_t d = 0; d < dim; d += 4 * kStep, to += 4 * kInt8Block) {
    FourWords fours[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t at = Full || i < last ? i : last;
      fours[i] = four_words(from + at * stride + d, kWhole ? static_cast<int>(block.zeros[j + at]) : 0);
    }
    const Words a = with_offset(joined(fours)), b = with_offset(joined(fours + 1));
    const Words c = with_offset(joined(fours + 2)), e = with_offset(joined(fours + 3));
    const Pairs low = (Pairs)__builtin_shufflevector(a, b, FOURS(0, kB, 1, kB + 1));
    const Pairs low2 = (Pairs)__builtin_shufflevector(c, e, FOURS(0, kB, 1, kB + 1));
    const Pairs high = (Pairs)__builtin_shufflevector(a, b, FOURS(2, kB + 2, 3, kB + 3));
    const Pairs high2 = (Pairs)__builtin_shufflevector(c, e, FOURS(2, kB + 2, 3, kB + 3));
    const Words words[4] = {
        (Words)__builtin_shufflevector(low, low2, TWOS(0, kB / 2)),
        (Words)__builtin_shufflevector(low, low2, TWOS(1, kB / 2 + 1)),
        (Words)__builtin_shufflevector(high, high2, TWOS(0, kB / 2)),
        (Words)__builtin_shufflevector(high, high2, TWOS(1, kB / 2 + 1))};
    for (int n = 0; n < 4; ++n) {
      store_words(to + n * kInt8Block, words[n]);
      if (!kWhole) sums = dots(sums, words[n], ones);
    }
  }
  if (!kWhole) store_words(block.sums + j, sums);
}

inline void gather_keys(const Int8Attention& call, int64_t begin, int64_t group, const Block& block) {
  const int64_t dim = call.head_dim, stride = call.groups * dim;
  const int8_t* from = call.key.values + place(call, begin, group) * dim;
  for (int64_t i = 0; i < block.present; ++i)
    for (int64_t d = 0; d < dim; d += 64) __builtin_prefetch(from + (i + kAhead) * stride + d);
  int64_t j = 0;
  for (; j + kLanes <= block.present; j += kLanes) gather_lanes<true>(from + j * stride, stride, dim, j, kLanes, block);
  if (j < block.present) gather_lanes<false>(from + j * stride, stride, dim, j, block.present - j, block);
}

inline void gather_values(const int8_t* from, int64_t stride, int64_t dim, const Block& block) {
  for (int64_t j = 0; j < block.present; ++j) {
    for (int64_t d = 0; d < dim; d += 64) __builtin_prefetch(from + (j + kAhead) * stride + d);
    for (int64_t d = 0; d < dim; d += kLanes) store(block.values + j * dim + d, load(from + j * stride + d));
  }
}

/// Row `row` of the tile's queries, from the place `at` of the call's.
inline void gather_query(const Int8Attention& call, int64_t at, int64_t row, const Queries& queries) {
  const int64_t dim = call.head_dim;
  const int8_t* from = call.query.values + at * dim;
  const int zero = call.query.zeros[at];
  Word* to = queries.words + row * (dim / kStep);
  int sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += from[d] - zero;
  if (kStep == 4) __builtin_memcpy(to, from, dim);
  if (kStep == 2)
    for (int64_t d = 0; d < dim; ++d) {
      const auto value = static_cast<int16_t>(from[d] - zero);
      __builtin_memcpy(reinterpret_cast<char*>(to) + d * sizeof value, &value, sizeof value);
    }
  if (kStep == 1)
    for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<Word>(from[d] - zero);
  queries.zeros[row] = static_cast<Word>(zero), queries.sums[row] = static_cast<Word>(sum);
  queries.factors[row] = call.query.scales[at] * (call.scale * kLog2E);
}

inline void gather_queries(const Int8Attention& call, const Tile& tile, const Queries& queries) {
  const int64_t share = call.heads / call.groups;
  int64_t row = 0;
  for (int64_t group = tile.group_begin; group < tile.group_end; ++group)
    for (int64_t i = tile.query_begin; i < tile.query_end; ++i)
      for (int64_t head = 0; head < share; ++head)
        gather_query(call, i * call.heads + group * share + head, row++, queries);
}

/// Scores of R rows, of which `row` is the first, against N vectors of keys from `j` on.
template <int R, int N>
inline void score(const Queries& queries, int64_t row, const Block& block, int64_t j, int64_t words, float* scores) {
  Words total[R][N] = {};
  const Word* query = queries.words + row * words;
  for (int64_t w = 0; w < words; ++w) {
    Words k[N];
    for (int n = 0; n < N; ++n) k[n] = load_words(block.keys + w * kInt8Block + j + n * kLanes);
    for (int r = 0; r < R; ++r) {
      const Words q = query[r * words + w] - Words{};
      for (int n = 0; n < N; ++n) total[r][n] = dots(total[r][n], k[n], q);
    }
  }
  for (int n = 0; n < N; ++n) {
    const int64_t at = j + n * kLanes;
    const Vector scale = load(block.scales + at);
    for (int r = 0; r < R; ++r) {
      Words sum = total[r][n];
      if (!kWhole)  // Σ (k - zero) (q - zero), of Σ (k + offset) q
        sum -= queries.zeros[row + r] * load_words(block.sums + at) +
               queries.sums[row + r] * load_words(block.zeros + at);
      store(scores + r * kKeyBlock + at, __builtin_convertvector(sum, Vector) * scale * queries.factors[row + r]);
    }
  }
}

/// R rows, of which `row` is the first, through one block.
template <int R, int Ahead, class Element>
inline void attend_rows(
    const Queries& queries, int64_t row, const Block& block, const Values<Element>& values, const Sight* sights,
    int64_t dim, float* scores, const Partial& partial) {
  int64_t j = 0;
  for (; j + kColumns * kLanes <= block.present; j += kColumns * kLanes)
    score<R, kColumns>(queries, row, block, j, dim / kStep, scores);
  for (; j < block.present; j += kLanes) score<R, 1>(queries, row, block, j, dim / kStep, scores);
  weigh<R, Ahead>(
      scores, sights, block.present, values, dim, partial.sums + row * dim, partial.maxima + row,
      partial.weights + row);
}

/// The rows of one group, the first of which is `first`, through one block of keys that begins with `begin`.
template <int Ahead, class Element>
inline void attend_group(
    const Int8Attention& call, const Tile& tile, const Queries& queries, const Block& block,
    const Values<Element>& values, int64_t begin, int64_t first, float* scores, const Partial& partial) {
  constexpr decltype(&attend_rows<1, Ahead, Element>) kAttendRows[] = {
      attend_rows<1, Ahead, Element>, attend_rows<2, Ahead, Element>, attend_rows<3, Ahead, Element>,
      attend_rows<4, Ahead, Element>};
  const int64_t rows = group_rows(call, tile), share = call.heads / call.groups;
  for (int64_t row = 0; row < rows;) {
    const int64_t taken = rows - row < kRows ? rows - row : kRows;
    Sight sights[kRows];
    for (int64_t r = 0; r < taken; ++r) sights[r] = sight_of(call, tile.query_begin + (row + r) / share, begin);
    kAttendRows[taken - 1](queries, first + row, block, values, sights, call.head_dim, scores, partial);
    row += taken;
  }
}

}  // namespace

void INT8_TILE(const Int8Attention& call, const Tile& tile, const Partial& partial, float* scratch) {
  const int64_t rows = tile_rows(call, tile), of_group = group_rows(call, tile), dim = call.head_dim;
  const int64_t stride = call.groups * dim;
  float* next = scratch;
  const auto floats = [&next](int64_t count) { return (next += count) - count; };
  const auto words = [&floats](int64_t count) { return reinterpret_cast<Word*>(floats(count)); };
  Block block = {};
  block.keys = words(kInt8Block * dim), block.values = floats(kInt8Block * dim);
  block.sums = words(kInt8Block), block.zeros = words(kInt8Block), block.scales = floats(kInt8Block);
  block.value_scales = floats(kInt8Block), block.value_zeros = floats(kInt8Block);
  float* scores = floats(kMostRows * kKeyBlock);
  const Queries queries = {words(rows * dim), words(rows), words(rows), floats(rows)};
  gather_queries(call, tile, queries);
  for (int64_t i = 0; i < rows * dim; ++i) partial.sums[i] = 0.0F;
  for (int64_t i = 0; i < rows; ++i) partial.maxima[i] = kLowest, partial.weights[i] = 0.0F;
  for (int64_t begin = tile.key_begin; begin < tile.key_end; begin += kInt8Block) {
    const int64_t left = tile.key_end - begin;
    block.present = left < kInt8Block ? left : kInt8Block;
    for (int64_t group = tile.group_begin; group < tile.group_end; ++group) {
      const int64_t first = (group - tile.group_begin) * of_group;
      const int8_t* from = call.value.values + place(call, begin, group) * dim;
      gather_scales(call, begin, group, block);
      gather_keys(call, begin, group, block);
      if (of_group <= kMostRows) {  // so few rows convert values as they meet them
        const Values<int8_t> values = {from, stride, block.value_scales, block.value_zeros};
        attend_group<kAhead>(call, tile, queries, block, values, begin, first, scores, partial);
      } else {
        gather_values(from, stride, dim, block);
        const Values<float> values = {block.values, dim, block.value_scales, block.value_zeros};
        attend_group<0>(call, tile, queries, block, values, begin, first, scores, partial);
      }
    }
  }
}

}  // namespace runner
