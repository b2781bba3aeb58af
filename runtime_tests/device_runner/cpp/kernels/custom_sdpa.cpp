// llama::custom_sdpa.out: attention of query [B, S, H, D] over caches [B, T, G, D], causal over those filled up to
// start_pos + S, or with a mask. All are float32 or all bfloat16, and so is the output; sums are float32.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../base/threads.h"
#include "operands.h"

namespace runner {
namespace {

using executorch::aten::BFloat16;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

/// One batch after the other, over caches of Number.
template <class Number>
void attend_batches(
    const Shape& shape, const float* query, const Tensor& key, const Tensor& value, int64_t batches, float scale,
    float* out) {
  static const Isa isa = best_isa();
  const Parallel& parallel = pool();
  const int64_t in = shape.new_tokens * shape.heads * shape.head_dim, cached = key.numel() / batches;
  for (int64_t b = 0; b < batches; ++b) {
    Attention<Number> call = {shape, scale};
    call.query = query + b * in, call.out = out + b * in;
    call.key = static_cast<const Number*>(key.const_data_ptr()) + b * cached;
    call.value = static_cast<const Number*>(value.const_data_ptr()) + b * cached;
    attend(call, isa, parallel);
  }
}

Tensor& custom_sdpa(
    KernelRuntimeContext& context, const Tensor& query, const Tensor& key, const Tensor& value, int64_t start,
    const std::optional<Tensor> mask, double dropout, bool causal, const std::optional<double> scale, Tensor& out) {
  const ScalarType type = query.scalar_type();
  ET_KERNEL_CHECK_MSG(
      context,
      (type == ScalarType::Float || type == ScalarType::BFloat16) && plain(query, type) && plain(key, type) &&
          plain(value, type) && shapes_fit(query, key, value, start),
      InvalidArgument, out, "types or shapes of query and caches do not fit");
  ET_KERNEL_CHECK_MSG(
      context, causal_or_masked(causal, mask, query, key) && dropout == 0, NotSupported, out,
      "only causal attention, or with a float32 mask of all positions, is computed");
  ET_KERNEL_CHECK_MSG(
      context, executorch::runtime::resize_tensor(out, query.sizes()) == Error::Ok && plain(out, type),
      InvalidArgument, out, "the output is not of the query's form");
  const Shape shape = shape_of(query, key, start, mask);
  const float factor = scale_or_usual(scale, query.size(3));
  if (type == ScalarType::Float) {
    attend_batches<float>(
        shape, query.const_data_ptr<float>(), key, value, query.size(0), factor, out.mutable_data_ptr<float>());
    return out;
  }
  const auto* from = query.const_data_ptr<BFloat16>();
  const std::vector<float> wide(from, from + query.numel());
  std::vector<float> sums(query.numel());
  attend_batches<Bfloat16>(shape, wide.data(), key, value, query.size(0), factor, sums.data());
  std::copy(sums.begin(), sums.end(), out.mutable_data_ptr<BFloat16>());
  return out;
}

EXECUTORCH_LIBRARY(llama, "custom_sdpa.out", custom_sdpa);

}  // namespace
}  // namespace runner
