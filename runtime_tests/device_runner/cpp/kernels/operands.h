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

/// Whether a call is causal, or has a mask [S, T] of float32.
inline bool causal_or_masked(
    bool causal, const std::optional<executorch::aten::Tensor>& mask, const executorch::aten::Tensor& query,
    const executorch::aten::Tensor& key) {
  if (!mask.has_value()) return causal;
  return !causal && mask->dim() == 2 && mask->scalar_type() == executorch::aten::ScalarType::Float &&
         executorch::runtime::tensor_is_default_dim_order(*mask) && mask->size(0) == query.size(1) &&
         mask->size(1) == key.size(1);
}

/// Of a call of these operands; `start`: read where there is no mask.
inline Shape shape_of(
    const executorch::aten::Tensor& query, const executorch::aten::Tensor& key, int64_t start,
    const std::optional<executorch::aten::Tensor>& mask) {
  Shape shape = {};
  shape.new_tokens = query.size(1), shape.heads = query.size(2), shape.head_dim = query.size(3);
  shape.groups = key.size(2), shape.positions = key.size(1), shape.start = start;
  shape.mask = mask.has_value() ? mask->const_data_ptr<float>() : nullptr;
  return shape;
}

inline float scale_or_usual(std::optional<double> scale, int64_t head_dim) {
  return static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim))));
}

}  // namespace runner
