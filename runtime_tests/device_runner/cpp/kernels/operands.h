// What the attention operators ask of their tensors.
#pragma once

#include <executorch/runtime/core/exec_aten/util/tensor_util.h>

#include <cmath>
#include <optional>

#include "attention.h"

namespace runner {

inline bool plain(const executorch::aten::Tensor& tensor, executorch::aten::ScalarType type) {
  return tensor.dim() == 4 && tensor.scalar_type() == type && executorch::runtime::tensor_is_default_dim_order(tensor);
}

/// Whether the new positions of query [B, S, H, D] lie in caches [B, T, G, D], which are plain, from `start` on.
inline bool shapes_fit(
    const executorch::aten::Tensor& query, const executorch::aten::Tensor& key, const executorch::aten::Tensor& value,
    int64_t start) {
  for (int i = 0; i < 4; ++i)
    if (key.size(i) != value.size(i)) return false;
  return query.numel() > 0 && query.size(0) == key.size(0) && query.size(3) == key.size(3) &&
         query.size(3) % kHeadDimMultiple == 0 && key.size(2) > 0 && query.size(2) % key.size(2) == 0 && start >= 0 &&
         start <= key.size(1) && query.size(1) <= key.size(1) - start;
}

inline float scale_or_usual(std::optional<double> scale, int64_t head_dim) {
  return static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim))));
}

}  // namespace runner
