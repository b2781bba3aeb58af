#include "model.h"

#include <executorch/runtime/platform/runtime.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"

namespace runner {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;
using executorch::runtime::Error;
using executorch::runtime::MethodMeta;
using executorch::runtime::Program;

namespace {

constexpr const char* kForward = "forward";

void check(Error error, Stage stage, const std::string& what) {
  if (error != Error::Ok)
    throw Failure(stage, what + ": ExecuTorch error " + executorch::runtime::to_string(error));
}

/// Keys of `count` slots, as RoPE gives them from position `from` on, to what it gives from position `to` on.
void turn(
    float* keys, int64_t count, int64_t slot_floats, const std::vector<double>& frequencies, int64_t from, int64_t to) {
  const auto pairs = static_cast<int64_t>(frequencies.size());
  for (int64_t slot = 0; slot < count; ++slot)
    for (int64_t pair = 0; pair < pairs; ++pair) {
      // the angles of RoPE's tables are float32; their difference is exact in double
      const auto frequency = static_cast<float>(frequencies[pair]);
      const float before = static_cast<float>(from + slot) * frequency, after = static_cast<float>(to + slot) * frequency;
      const double by = static_cast<double>(after) - before;
      const auto cosine = static_cast<float>(std::cos(by)), sine = static_cast<float>(std::sin(by));
      for (float* head = keys + slot * slot_floats; head < keys + (slot + 1) * slot_floats; head += 2 * pairs) {
        const float one = head[pair], other = head[pair + pairs];
        head[pair] = one * cosine - other * sine;
        head[pair + pairs] = other * cosine + one * sine;
      }
    }
}

}  // namespace

Memory::Memory(const MethodMeta& meta) {
  for (size_t i = 0; i < meta.num_memory_planned_buffers(); ++i) {
    const auto size = meta.memory_planned_buffer_size(i);
    check(size.error(), Stage::load, "planned memory");
    auto* memory = *size < 0 ? nullptr : std::calloc(1, std::max<int64_t>(1, *size));
    if (memory == nullptr) throw Failure(Stage::load, "no memory for a cache of " + std::to_string(*size) + " bytes");
    buffers_.emplace_back(static_cast<uint8_t*>(memory), std::free);
    spans_.emplace_back(buffers_.back().get(), *size);
  }
  planned_.emplace(executorch::runtime::Span<executorch::runtime::Span<uint8_t>>(spans_.data(), spans_.size()));
  manager_.emplace(&method_, &*planned_, &temporary_);
}

Model::Model(const std::string& path) : path_(path), loader_(path) {
  executorch::runtime::runtime_init();
  // the default verification trusts every offset in the file
  auto program = Program::load(&loader_, Program::Verification::InternalConsistency);
  check(program.error(), Stage::load, "cannot load " + path);
  program_.emplace(std::move(*program));
  const auto meta = program_->method_meta(kForward);
  check(meta.error(), Stage::load, "cannot find method forward of " + path);
  memory_.emplace(*meta);
  auto method = program_->load_method(kForward, memory_->manager());
  check(method.error(), Stage::load, "cannot load method forward of " + path);
  method_.emplace(std::move(*method));
  loader_.keep();
  context_length_ = constant("get_max_context_len");
  vocab_size_ = constant("get_vocab_size");
  read_policy();
  check_inputs(*meta);
}

void Model::read_policy() {
  window_ = slots_ = context_length_;
  if (program_->method_meta("get_window").ok()) {
    window_ = constant("get_window"), slots_ = constant("get_cache_slots");
    if (window_ < 1 || window_ > slots_ || slots_ > context_length_)
      throw Failure(
          Stage::load, "a window of " + std::to_string(window_) + " tokens in " + std::to_string(slots_) + " slots");
  }
  if (program_->method_meta("get_sink").ok()) {
    sink_ = constant("get_sink");
    frequencies_ = constants<double>("get_rope_frequencies");
    if (sink_ < 1 || sink_ > context_length_ / 2 || frequencies_.empty())
      throw Failure(Stage::load, "a sink of " + std::to_string(sink_) + " tokens");
  }
}

void Model::check_inputs(const MethodMeta& meta) {
  const bool shape = meta.num_inputs() == 2 && meta.num_outputs() == 1;
  if (!shape) throw Failure(Stage::load, "forward is not (tokens, input_pos) -> logits");
  const auto tokens = meta.input_tensor_meta(0), position = meta.input_tensor_meta(1);
  const auto logits = meta.output_tensor_meta(0);
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

template <class Number>
std::vector<Number> Model::constants(const char* name) const {
  const std::string what = std::string("method ") + name;
  const auto meta = program_->method_meta(name);
  check(meta.error(), Stage::load, what);
  Memory memory(*meta);
  auto method = program_->load_method(name, memory.manager());
  check(method.error(), Stage::load, what);
  check(method->execute(), Stage::load, what);
  std::vector<Number> values;
  for (size_t i = 0; i < method->outputs_size(); ++i) {
    const auto& value = method->get_output(i);
    if (!value.isInt() && !value.isDouble()) throw Failure(Stage::load, std::string(name) + " does not give numbers");
    values.push_back(static_cast<Number>(value.isInt() ? value.toInt() : value.toDouble()));
  }
  return values;
}

int64_t Model::constant(const char* name) const {
  const auto values = constants<int64_t>(name);
  if (values.size() != 1) throw Failure(Stage::load, std::string(name) + " does not give a number");
  return values[0];
}

void Model::rewind(int64_t length) {
  if (length == 0) left_ = 0;
  const int64_t earliest = left_ == 0 ? 0 : sink_ > 0 ? sink_ : left_ + window_ - 1;
  if (length > static_cast<int64_t>(tokens_.size()) || (length > 0 && length < earliest))
    throw Failure(
        Stage::run,
        "no rewinding to " + std::to_string(length) + " tokens: the cache holds " + std::to_string(tokens_.size()));
  tokens_.resize(length);
}

const std::vector<CacheBuffer>& Model::buffers() {
  if (written_caches().empty()) {
    const int64_t any = 0;
    execute(&any, 1);
    tokens_.pop_back();
  }
  for (const auto& buffer : written_caches())
    if (buffer.slots != slots_) throw Failure(Stage::run, "the program's KV cache has other slots than it says");
  return written_caches();
}

void Model::feed(const std::vector<int64_t>& tokens) {
  const auto count = static_cast<int64_t>(tokens.size());
  if (sink_ < 0 && count > context_length_ - static_cast<int64_t>(tokens_.size()))
    throw Failure(
        Stage::run, std::to_string(count) + " tokens at position " + std::to_string(tokens_.size()) +
                        ": the context holds " + std::to_string(context_length_));
  for (const int64_t token : tokens)
    if (token < 0 || token >= vocab_size_)
      throw Failure(
          Stage::run, "token " + std::to_string(token) + ": the vocabulary has " + std::to_string(vocab_size_));
  for (int64_t done = 0; done < count;) {
    if (static_cast<int64_t>(tokens_.size()) == context_length_) make_room();
    const int64_t room = context_length_ - static_cast<int64_t>(tokens_.size());
    const int64_t piece = std::min({longest_piece_, count - done, room});
    execute(tokens.data() + done, piece);
    done += piece;
  }
}

/// As `Session.make_room` in runtime_tests/sessions/base.py: the older half behind the sink leaves, the rest moves up.
void Model::make_room() {
  const int64_t count = (context_length_ - sink_) / 2, behind = sink_ + count, moved = context_length_ - behind;
  const auto& all = buffers();
  for (size_t i = 0; i < all.size(); ++i) {
    auto* to = static_cast<char*>(all[i].data) + sink_ * all[i].slot_bytes;
    std::memmove(to, to + count * all[i].slot_bytes, moved * all[i].slot_bytes);
    // a step writes the values of a layer, then its keys
    if (i % 2 == 1) turn(reinterpret_cast<float*>(to), moved, all[i].slot_bytes / sizeof(float), frequencies_, behind, sink_);
  }
  tokens_.erase(tokens_.begin() + sink_, tokens_.begin() + behind);
  left_ += count;
}

void Model::execute(const int64_t* tokens, int64_t count) {
  int64_t position = tokens_.size();
  int32_t sizes[] = {1, static_cast<int32_t>(count)}, strides[] = {sizes[1], 1};
  uint8_t order[] = {0, 1};
  TensorImpl ids(ScalarType::Long, 2, sizes, const_cast<int64_t*>(tokens), order, strides);  // inputs are only read
  TensorImpl start(ScalarType::Long, 1, sizes, &position, order, &strides[1]);               // [1]: the first of sizes
  const std::string what = "forward at position " + std::to_string(position);
  check(method_->set_input(Tensor(&ids), 0), Stage::run, what);
  check(method_->set_input(Tensor(&start), 1), Stage::run, what);
  check(method_->execute(), Stage::run, what);
  const auto& logits = method_->get_output(0).toTensor();
  logits_ = logits.const_data_ptr<float>() + (logits.numel() - vocab_size_);  // of the last position
  tokens_.insert(tokens_.end(), tokens, tokens + count);
  if (sink_ < 0) left_ = std::max(left_, static_cast<int64_t>(tokens_.size()) - slots_);  // the ring's slot is p mod slots_
}

}  // namespace runner
