// One loaded .pte: tokens in, logits of the last one out. The cache lives in the program.
#pragma once

#include <executorch/extension/module/module.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "loader.h"

namespace runner {

/// The memory that a program asks for, most of it its cache. Only used pages are resident, whereas Module's own buffers
/// would be filled with zeros at once.
class PlannedMemory {
 public:
  explicit PlannedMemory(const executorch::runtime::MethodMeta& meta);
  executorch::runtime::HierarchicalAllocator* allocator() { return &*allocator_; }

 private:
  std::vector<std::unique_ptr<uint8_t, decltype(&std::free)>> buffers_;
  std::vector<executorch::runtime::Span<uint8_t>> spans_;
  std::optional<executorch::runtime::HierarchicalAllocator> allocator_;
};

/// Every position that attention reads was written since the last reset, so reset only rewinds.
class Model {
 public:
  /// Loads the program; a load failure names its defect.
  explicit Model(const std::string& path);

  void reset() { position_ = 0; }

  /// Continue the cache, in pieces as large as the program takes. Running out of context changes nothing.
  void feed(const std::vector<int64_t>& tokens);

  /// Logits of the last fed token, vocab_size of them; valid until the next feed.
  const float* logits() const { return logits_; }

  int64_t vocab_size() const { return vocab_size_; }
  int64_t context_length() const { return context_length_; }

 private:
  Model(const std::string& path, std::unique_ptr<Loader> loader);
  void check_inputs();
  int64_t constant(const std::string& method);
  void execute(const int64_t* tokens, int64_t count);

  std::optional<PlannedMemory> memory_;  // outlives the module, whose method lies in it
  Loader* loader_;                      // the module's
  executorch::extension::Module module_;
  int64_t vocab_size_ = 0, context_length_ = 0, longest_piece_ = 0, position_ = 0;
  const float* logits_ = nullptr;
};

}  // namespace runner
