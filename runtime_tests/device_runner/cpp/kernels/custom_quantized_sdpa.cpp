// llama::custom_quantized_sdpa.out: attention of an int8 query [B, S, H, D] over int8 caches [B, T, G, D], causal over
// those filled up to start_pos + S, or with a mask. Each has zeros, int8, and scales, float32, of each position and head: [B, S or T, H or G, 1].
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>

#include <optional>

#include "../base/threads.h"
#include "attention.h"
#include "operands.h"

namespace runner {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;
using Optional = std::optional<Tensor>;

/// Whether `part` has one element of the type for each position and head of `values`.
bool one_for_each_head(const Optional& part, const Tensor& values, ScalarType type) {
  if (!part.has_value() || !plain(*part, type) || part->size(3) != 1) return false;
  for (int i = 0; i < 3; ++i)
    if (part->size(i) != values.size(i)) return false;
  return true;
}

bool quantized(const Tensor& values, const Optional& zeros, const Optional& scales) {
  return plain(values, ScalarType::Char) && one_for_each_head(zeros, values, ScalarType::Char) &&
         one_for_each_head(scales, values, ScalarType::Float);
}

Int8Heads heads_of(const Tensor& values, const Optional& zeros, const Optional& scales, int64_t batch) {
  const int64_t all = values.size(1) * values.size(2);
  return {
      values.const_data_ptr<int8_t>() + batch * all * values.size(3), zeros->const_data_ptr<int8_t>() + batch * all,
      scales->const_data_ptr<float>() + batch * all};
}

Tensor& custom_quantized_sdpa(
    KernelRuntimeContext& context, const Tensor& query, const Tensor& key, const Tensor& value, int64_t start,
    const Optional mask, double dropout, bool causal, const std::optional<double> scale, const Optional query_zeros,
    const Optional query_scales, const Optional key_zeros, const Optional key_scales, const Optional value_zeros,
    const Optional value_scales, bool heads_before_positions, Tensor& out) {
  ET_KERNEL_CHECK_MSG(
      context,
      quantized(query, query_zeros, query_scales) && quantized(key, key_zeros, key_scales) &&
          quantized(value, value_zeros, value_scales) && shapes_fit(query, key, value, start),
      InvalidArgument, out, "types or shapes of query and caches do not fit");
  ET_KERNEL_CHECK_MSG(
      context, causal_or_masked(causal, mask, query, key) && dropout == 0 && !heads_before_positions, NotSupported, out,
      "only attention over [B, T, G, D], causal or with a float32 mask of all positions, is computed");
  ET_KERNEL_CHECK_MSG(
      context,
      executorch::runtime::resize_tensor(out, query.sizes()) == Error::Ok && plain(out, ScalarType::Float),
      InvalidArgument, out, "the output is not of the query's form");
  static const Isa isa = best_isa();
  const Parallel& parallel = pool();
  for (int64_t b = 0; b < query.size(0); ++b) {
    Int8Attention call = {shape_of(query, key, start, mask), scale_or_usual(scale, query.size(3))};
    call.query = heads_of(query, query_zeros, query_scales, b);
    call.key = heads_of(key, key_zeros, key_scales, b);
    call.value = heads_of(value, value_zeros, value_scales, b);
    call.out = out.mutable_data_ptr<float>() + b * (out.numel() / query.size(0));
    attend_int8(call, isa, parallel);
  }
  return out;
}

EXECUTORCH_LIBRARY(llama, "custom_quantized_sdpa.out", custom_quantized_sdpa);

}  // namespace
}  // namespace runner
