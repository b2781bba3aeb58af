// Causal grouped-query attention over a cache, in float32, independent of ExecuTorch.
//
// Shapes: S new tokens, T positions of the cache, H query heads, G key/value heads, D head_dim.
#pragma once

#include <cstddef>
#include <cstdint>

#include "parallel.h"

namespace runner {

/// One call; every tensor is contiguous. Positions of the cache past start + S - 1 are never read.
struct Attention {
  const float* query;  // [S, H, D]
  const float* key;    // [T, G, D]
  const float* value;  // [T, G, D]
  float* out;          // [S, H, D]
  int64_t new_tokens, heads, groups, head_dim;
  int64_t start;  // position of the first new token; start + S <= T
  float scale;
};

/// Instruction sets that `attention_tile.cpp` is compiled for.
enum class Isa { baseline, avx2, avx512 };

/// The best one that this processor has.
Isa best_isa();

/// Head sizes it computes are multiples of this.
constexpr int64_t kHeadDimMultiple = 4;

/// Softmax(q · kᵀ · scale) · v, each query over the positions up to its own.
void attend(const Attention& call, Isa isa, const Parallel& parallel);

}  // namespace runner
