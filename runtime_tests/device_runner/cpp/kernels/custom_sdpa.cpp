// llama::custom_sdpa.out: causal attention of query [B, S, H, D] over caches [B, T, G, D] filled up to start_pos + S.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>

#include <optional>

#include "../base/threads.h"
#include "operands.h"

namespace runner {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

Tensor& custom_sdpa(
    KernelRuntimeContext& context, const Tensor& query, const Tensor& key, const Tensor& value, int64_t start,
    const std::optional<Tensor> mask, double dropout, bool causal, const std::optional<double> scale, Tensor& out) {
  ET_KERNEL_CHECK_MSG(
      context,
      plain(query, ScalarType::Float) && plain(key, ScalarType::Float) && plain(value, ScalarType::Float) &&
          shapes_fit(query, key, value, start),
      InvalidArgument, out, "shapes of query and caches do not fit");
  ET_KERNEL_CHECK_MSG(
      context, causal && !mask.has_value() && dropout == 0, NotSupported, out, "only causal attention is computed");
  ET_KERNEL_CHECK_MSG(
      context, executorch::runtime::resize_tensor(out, query.sizes()) == Error::Ok && plain(out, ScalarType::Float),
      InvalidArgument, out, "the output is not of the query's form");
  static const Isa isa = best_isa();
  const Parallel& parallel = pool();
  const int64_t batches = query.size(0), in = query.numel() / batches, cached = key.numel() / batches;
  for (int64_t b = 0; b < batches; ++b) {
    Attention call = {};
    call.query = query.const_data_ptr<float>() + b * in;
    call.key = key.const_data_ptr<float>() + b * cached;
    call.value = value.const_data_ptr<float>() + b * cached;
    call.out = out.mutable_data_ptr<float>() + b * in;
    call.new_tokens = query.size(1), call.heads = query.size(2), call.head_dim = query.size(3);
    call.groups = key.size(2);
    call.start = start;
    call.scale = scale_or_usual(scale, query.size(3));
    attend(call, isa, parallel);
  }
  return out;
}

EXECUTORCH_LIBRARY(llama, "custom_sdpa.out", custom_sdpa);

}  // namespace
}  // namespace runner
