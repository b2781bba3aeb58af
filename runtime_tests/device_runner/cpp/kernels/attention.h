// Causal grouped-query attention over a cache of float32, bfloat16 or int8, independent of ExecuTorch.
//
// Shapes: S new tokens, T positions of the cache, H query heads, G key/value heads, D head_dim.
#pragma once

#include <cstddef>
#include <cstdint>

#include "parallel.h"

namespace runner {

/// Of one call. Without a mask, positions of the cache past start + S - 1 are never read.
struct Shape {
  int64_t new_tokens, heads, groups, head_dim;
  int64_t start;      // position of the first new token; start + S <= T
  int64_t positions;  // T, read where there is a mask
  const float* mask;  // [S, T], added to the scores; null: each query sees the positions up to its own

  /// Positions before the first that a query cannot see.
  int64_t seen(int64_t query) const { return mask != nullptr ? positions : start + query + 1; }
};

/// The upper half of a float32.
struct Bfloat16 {
  uint16_t bits;
};

/// A call over a cache of Number, float or Bfloat16, computed in float32; every tensor is contiguous.
template <class Number>
struct Attention : Shape {
  float scale;
  const float* query;   // [S, H, D]
  const Number* key;    // [T, G, D]
  const Number* value;  // [T, G, D]
  float* out;           // [S, H, D]
};

/// An int8 tensor of N positions: (value - zero) · scale, with one zero and scale for each position and head.
struct Int8Heads {
  const int8_t* values;  // [N, heads, D]
  const int8_t* zeros;   // [N, heads]
  const float* scales;   // [N, heads]
};

/// A call with int8 operands; every tensor is contiguous.
struct Int8Attention : Shape {
  float scale;
  Int8Heads query, key, value;
  float* out;  // [S, H, D]
};

/// Instruction sets that the tiles are compiled for, each with all that stand before it: avx512_vnni and dotprod have dot
/// products of int8.
#if defined(__aarch64__)
enum class Isa { baseline, dotprod };
#else
enum class Isa { baseline, avx2, avx512, avx512_vnni };
#endif

/// The best one that this processor has.
Isa best_isa();

/// Head sizes it computes are multiples of this.
constexpr int64_t kHeadDimMultiple = 4;

/// Softmax(q · kᵀ · scale + mask) · v. A query must see one position at least.
void attend(const Attention<float>& call, Isa isa, const Parallel& parallel);
void attend(const Attention<Bfloat16>& call, Isa isa, const Parallel& parallel);

/// The same of int8 operands, as exact as float32 allows. A row's bits depend on its own position only, not on how many
/// rows there are.
void attend_int8(const Int8Attention& call, Isa isa, const Parallel& parallel);

}  // namespace runner
