// Vectors of the compiler, as wide as the flags of this compilation allow, and the steps of an online softmax on them.
// For files that are compiled once for each instruction set. Only plain loops and no standard templates: the linker could
// choose an inline function of the standard library that was compiled here with AVX for the whole program.
#pragma once

#include <cstdint>

#include "attention_tile.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

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
constexpr int kColumns = 4;  // vectors of a row, or keys, processed at once

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint16_t UnalignedHalves __attribute__((vector_size(kLanes * sizeof(uint16_t)), aligned(2), may_alias));
typedef float Four __attribute__((vector_size(16)));
typedef float Unaligned __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef float UnalignedFour __attribute__((vector_size(16), aligned(4), may_alias));

constexpr float kLowest = -3.4e38F;  // finite: a row that has seen no key yet subtracts it without making a NaN
constexpr float kLog2E = 1.44269504F;

inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline Vector load(const int8_t* from);
inline Vector load(const Bfloat16* from) {
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const UnalignedHalves*>(from), Bits) << 16);
}
inline void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }
inline Vector all(float value) { return value - Vector{}; }
#if defined(__AVX512F__)  // compilers make a comparison and a choice of it
inline Vector larger(Vector a, Vector b) { return (Vector)_mm512_max_ps((__m512)a, (__m512)b); }
#else
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }
#endif

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

// widened: the next int8 as int32.
#if defined(__AVX512F__)
inline Integers widened(const int8_t* from) {
  return (Integers)_mm512_maskz_cvtepi8_epi32(0xFFFF, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#elif defined(__AVX2__)
inline Integers widened(const int8_t* from) {
  return (Integers)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
#elif defined(__x86_64__)
inline Integers widened(const int8_t* from) {
  int32_t four;
  __builtin_memcpy(&four, from, sizeof four);
  const __m128i bytes = _mm_cvtsi32_si128(four), pairs = _mm_unpacklo_epi8(bytes, bytes);
  return (Integers)_mm_unpacklo_epi16(pairs, pairs) >> 24;
}
#elif defined(__aarch64__)
inline Integers widened(const int8_t* from) {
  int32_t four;
  __builtin_memcpy(&four, from, sizeof four);
  return (Integers)vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(static_cast<uint32_t>(four)))));
}
#endif

inline Vector load(const int8_t* from) { return __builtin_convertvector(widened(from), Vector); }

/// The sum of each of four vectors.
inline Four sums_of(const Vector v[kColumns]) {
  return fold(add_pairs(add_pairs(v[0], v[1]), add_pairs(v[2], v[3])));
}

inline float maximum_of(Vector v) {
#if defined(__AVX512F__)
  const Eight low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  const Eight high = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15), eight = low > high ? low : high;
  const Four a = __builtin_shufflevector(eight, eight, 0, 1, 2, 3), b = __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#elif defined(__AVX2__)
  const Four a = __builtin_shufflevector(v, v, 0, 1, 2, 3), b = __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  const Four a = v, b = v;
#endif
  const Four four = a > b ? a : b;
  const float one = four[0] > four[1] ? four[0] : four[1], other = four[2] > four[3] ? four[2] : four[3];
  return one > other ? one : other;
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

/// sums[R, D] += p[R, keys] · value[keys, D] for N vectors of each row; values are prefetched `Ahead` positions ahead.
template <int R, int N, int Ahead, class Element>
inline void add_columns(
    const float* p, const Element* value, int64_t value_stride, int64_t keys, int64_t head_dim, float* sums) {
  constexpr int kBytes = kLanes * sizeof(Element), kEvery = kBytes < 64 ? 64 / kBytes : 1;  // one for each cache line
  Vector total[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) total[r][n] = load(sums + r * head_dim + n * kLanes);
  for (int64_t j = 0; j < keys; ++j) {
    Vector v[N];
    for (int n = 0; n < N; ++n) v[n] = load(value + j * value_stride + n * kLanes);
    if (Ahead > 0)
      for (int n = 0; n < N; n += kEvery) __builtin_prefetch(value + (j + Ahead) * value_stride + n * kLanes);
    for (int r = 0; r < R; ++r) {
      const float weight = p[r * kKeyBlock + j];
      for (int n = 0; n < N; ++n) total[r][n] += weight * v[n];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(sums + r * head_dim + n * kLanes, total[r][n]);
}

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

/// Values of one block of keys, of one group: those of integers with a scale and a zero for each key.
template <class Element>
struct Values {
  const Element* values;
  int64_t stride;
  const float* scales;  // null: values are what they are
  const float* zeros;
};

/// Turns weights p into p · scale, so that sums take the integers as they are. Returns Σ p · scale · zero.
inline float scale_row(float* p, int64_t keys, const float* scales, const float* zeros) {
  Vector total = {};
  for (int64_t j = 0; j < keys; j += kLanes) {
    const Vector scaled = load(p + j) * load(scales + j);
    store(p + j, scaled);
    total += scaled * load(zeros + j);
  }
  return sum_of(total);
}

/// What a row sees of a block of keys: the first ones, with what is added to their scores.
struct Sight {
  int64_t visible;
  const float* mask;  // null: nothing
};

inline Sight sight_of(const Shape& call, int64_t query, int64_t begin) {
  return {call.seen(query) - begin, call.mask != nullptr ? call.mask + query * call.positions + begin : nullptr};
}

/// R rows of scores against one block of keys into the rows' partial results.
template <int R, int Ahead, class Element>
inline void weigh(
    float* scores, const Sight* sights, int64_t keys, const Values<Element>& value, int64_t head_dim, float* sums,
    float* maxima, float* weights) {
  for (int r = 0; r < R; ++r) {
    float* row = scores + r * kKeyBlock;
    for (int64_t j = sights[r].visible < 0 ? 0 : sights[r].visible; j < keys; ++j) row[j] = -__builtin_inff();
    if (sights[r].mask != nullptr)
      for (int64_t j = 0; j < keys; ++j) row[j] += sights[r].mask[j] * kLog2E;
    const float factor = softmax_row(row, keys, maxima + r, weights + r);
    const float zero = value.scales != nullptr ? scale_row(row, keys, value.scales, value.zeros) : 0.0F;
    if (factor != 1.0F || zero != 0.0F)
      for (int64_t d = 0; d < head_dim; d += kLanes)
        store(sums + r * head_dim + d, load(sums + r * head_dim + d) * factor - zero);
  }
  int64_t d = 0;
  for (; d + kColumns * kLanes <= head_dim; d += kColumns * kLanes)
    add_columns<R, kColumns, Ahead>(scores, value.values + d, value.stride, keys, head_dim, sums + d);
  for (; d < head_dim; d += kLanes)
    add_columns<R, 1, Ahead>(scores, value.values + d, value.stride, keys, head_dim, sums + d);
}

}  // namespace
}  // namespace runner
