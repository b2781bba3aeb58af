// llama::update_cache.out: copies value [B, S, G, D] into cache [B, T, G, D] from position start_pos on;
// llama::update_cache_with_indices.out: to the positions in indices, int64 [B, S].
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>

#include "cache.h"

namespace runner {
namespace {

using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::tensor_is_default_dim_order;

bool same_form(const Tensor& value, const Tensor& cache) {
  return value.dim() == 4 && cache.dim() == 4 && value.scalar_type() == cache.scalar_type() &&
         value.size(0) == cache.size(0) && value.size(2) == cache.size(2) && value.size(3) == cache.size(3) &&
         tensor_is_default_dim_order(value) && tensor_is_default_dim_order(cache);
}

/// `out` carries nothing: the operator has one because every operator must.
Tensor& update_cache(KernelRuntimeContext& context, const Tensor& value, Tensor& cache, int64_t start, Tensor& out) {
  ET_KERNEL_CHECK_MSG(context, same_form(value, cache), InvalidArgument, out, "value and cache differ in form");
  const int64_t position = cache.size(2) * cache.size(3) * cache.element_size();
  const int64_t count = value.size(1), capacity = cache.size(1);
  auto* to = static_cast<char*>(cache.mutable_data_ptr());
  const auto* from = static_cast<const char*>(value.const_data_ptr());
  note_written(to, capacity, value.size(0) * position);
  for (int64_t b = 0; b < value.size(0); ++b) {
    const bool fits = copy_into_cache(
        to + b * capacity * position, from + b * count * position, start, count, capacity, position);
    ET_KERNEL_CHECK_MSG(context, fits, InvalidArgument, out, "positions outside the cache");
  }
  return out;
}

Tensor& update_cache_with_indices(
    KernelRuntimeContext& context, const Tensor& value, Tensor& cache, int64_t, const Tensor& indices, Tensor& out) {
  const bool placed = same_form(value, cache) && indices.dim() == 2 &&
                      indices.scalar_type() == executorch::aten::ScalarType::Long &&
                      tensor_is_default_dim_order(indices) && indices.size(0) == value.size(0) &&
                      indices.size(1) == value.size(1);
  ET_KERNEL_CHECK_MSG(context, placed, InvalidArgument, out, "value, cache and indices differ in form");
  const int64_t position = cache.size(2) * cache.size(3) * cache.element_size();
  const int64_t count = value.size(1), capacity = cache.size(1);
  auto* to = static_cast<char*>(cache.mutable_data_ptr());
  const auto* from = static_cast<const char*>(value.const_data_ptr());
  const auto* at = indices.const_data_ptr<int64_t>();
  note_written(to, capacity, value.size(0) * position);
  for (int64_t i = 0; i < value.size(0) * count; ++i) {
    const bool fits =
        copy_into_cache(to + i / count * capacity * position, from + i * position, at[i], 1, capacity, position);
    ET_KERNEL_CHECK_MSG(context, fits, InvalidArgument, out, "positions outside the cache");
  }
  return out;
}

EXECUTORCH_LIBRARY(llama, "update_cache.out", update_cache);
EXECUTORCH_LIBRARY(llama, "update_cache_with_indices.out", update_cache_with_indices);

}  // namespace
}  // namespace runner
