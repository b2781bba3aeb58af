#include "model.h"

#include <executorch/extension/tensor/tensor.h>

#include <algorithm>

#include "base/error.h"

namespace runner {

using executorch::aten::ScalarType;
using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::Program;

namespace {

constexpr const char* kForward = "forward";

void check(Error error, Stage stage, const std::string& what) {
  if (error != Error::Ok)
    throw Failure(stage, what + ": ExecuTorch error " + executorch::runtime::to_string(error));
}

}  // namespace

PlannedMemory::PlannedMemory(const executorch::runtime::MethodMeta& meta) {
  for (size_t i = 0; i < meta.num_memory_planned_buffers(); ++i) {
    const auto size = meta.memory_planned_buffer_size(i);
    check(size.error(), Stage::load, "planned memory");
    auto* memory = *size < 0 ? nullptr : std::calloc(1, std::max<int64_t>(1, *size));
    if (memory == nullptr) throw Failure(Stage::load, "no memory for a cache of " + std::to_string(*size) + " bytes");
    buffers_.emplace_back(static_cast<uint8_t*>(memory), std::free);
    spans_.emplace_back(buffers_.back().get(), *size);
  }
  allocator_.emplace(executorch::runtime::Span<executorch::runtime::Span<uint8_t>>(spans_.data(), spans_.size()));
}

Model::Model(const std::string& path) : Model(path, std::make_unique<Loader>(path)) {}

Model::Model(const std::string& path, std::unique_ptr<Loader> loader)
    : loader_(loader.get()), module_(std::move(loader)) {
  // the default verification trusts every offset in the file
  check(module_.load(Program::Verification::InternalConsistency), Stage::load, "cannot load " + path);
  const auto meta = module_.method_meta(kForward);
  check(meta.error(), Stage::load, "cannot find method forward of " + path);
  memory_.emplace(*meta);
  check(module_.load_method(kForward, memory_->allocator()), Stage::load, "cannot load method forward of " + path);
  loader_->keep();
  context_length_ = constant("get_max_context_len");
  vocab_size_ = constant("get_vocab_size");
  check_inputs();
}

void Model::check_inputs() {
  const auto meta = module_.method_meta(kForward);
  check(meta.error(), Stage::load, "method forward");
  const bool shape = meta->num_inputs() == 2 && meta->num_outputs() == 1;
  if (!shape) throw Failure(Stage::load, "forward is not (tokens, input_pos) -> logits");
  const auto tokens = meta->input_tensor_meta(0), position = meta->input_tensor_meta(1);
  const auto logits = meta->output_tensor_meta(0);
  const bool tensors = tokens.ok() && position.ok() && logits.ok();
  if (!tensors || tokens->scalar_type() != ScalarType::Long || tokens->sizes().size() != 2 ||
      tokens->sizes()[0] != 1 || tokens->sizes()[1] < 1 || position->scalar_type() != ScalarType::Long ||
      position->sizes().size() != 1 || position->sizes()[0] != 1)
    throw Failure(Stage::load, "forward's inputs are not int64 tokens [1, S] and input_pos [1]");
  if (logits->scalar_type() != ScalarType::Float || logits->sizes().empty() || vocab_size_ < 1 ||
      logits->sizes()[logits->sizes().size() - 1] != vocab_size_)
    throw Failure(Stage::load, "forward's output is not float32 logits of " + std::to_string(vocab_size_) + " tokens");
  longest_piece_ = std::min<int64_t>(tokens->sizes()[1], context_length_);  // sizes in the file are upper bounds
  if (longest_piece_ < 1) throw Failure(Stage::load, "the context length is " + std::to_string(context_length_));
}

int64_t Model::constant(const std::string& method) {
  const auto result = module_.execute(method);
  check(result.error(), Stage::load, "method " + method);
  if (result->size() != 1 || !result->at(0).isInt()) throw Failure(Stage::load, method + " does not give a number");
  return result->at(0).toInt();
}

void Model::feed(const std::vector<int64_t>& tokens) {
  const auto count = static_cast<int64_t>(tokens.size());
  if (count > context_length_ - position_)
    throw Failure(
        Stage::run, std::to_string(count) + " tokens at position " + std::to_string(position_) + ": the context holds " +
                        std::to_string(context_length_));
  for (const int64_t token : tokens)
    if (token < 0 || token >= vocab_size_)
      throw Failure(
          Stage::run, "token " + std::to_string(token) + ": the vocabulary has " + std::to_string(vocab_size_));
  for (int64_t done = 0; done < count; done += longest_piece_)
    execute(tokens.data() + done, std::min(longest_piece_, count - done));
}

void Model::execute(const int64_t* tokens, int64_t count) {
  using executorch::extension::from_blob;
  int64_t position = position_;
  const auto ids = from_blob(
      const_cast<int64_t*>(tokens), {1, static_cast<int32_t>(count)}, ScalarType::Long);  // inputs are only read
  const auto start = from_blob(&position, {1}, ScalarType::Long);
  const auto outputs = module_.execute(kForward, {ids, start});
  check(outputs.error(), Stage::run, "forward at position " + std::to_string(position_));
  const auto& logits = outputs->at(0).toTensor();
  logits_ = logits.const_data_ptr<float>() + (logits.numel() - vocab_size_);  // of the last position
  position_ += count;
}

}  // namespace runner
