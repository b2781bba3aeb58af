// One loaded .pte: tokens in, logits of the last one out. The cache lives in the program.
//
// Of ExecuTorch only the core is used, whose functions take and give no strings, vectors or other types of a C++ library:
// its libraries are built with GNU's, which our compiler's need not be.
#pragma once

#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/runtime/executor/program.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/cache.h"
#include "loader.h"

namespace runner {

/// The memory of one method. That which the program plans, most of it its cache, is resident only where it is used.
class Memory {
 public:
  explicit Memory(const executorch::runtime::MethodMeta& meta);
  executorch::runtime::MemoryManager* manager() { return &*manager_; }

 private:
  std::vector<std::unique_ptr<uint8_t, decltype(&std::free)>> buffers_;
  std::vector<executorch::runtime::Span<uint8_t>> spans_;
  std::optional<executorch::runtime::HierarchicalAllocator> planned_;
  executorch::extension::MallocMemoryAllocator method_, temporary_;
  std::optional<executorch::runtime::MemoryManager> manager_;
};

/// Every position that attention reads was written since the last reset, so reset and rewind only shorten the tokens.
class Model {
 public:
  /// Loads the program; a load failure names its defect.
  explicit Model(const std::string& path);

  /// Forget all but the first `length` tokens; a run failure where there are fewer.
  void rewind(int64_t length);

  /// Continue the cache, in pieces as large as the program takes. Running out of context changes nothing.
  void feed(const std::vector<int64_t>& tokens);

  /// Logits of the last fed token, vocab_size of them; valid until the next feed.
  const float* logits() const { return logits_; }

  /// In the cache, first to last.
  const std::vector<int64_t>& tokens() const { return tokens_; }
  const std::string& path() const { return path_; }

  /// The cache's buffers in the order in which a step writes them, each with all slots. The program
  /// names them by types of a C++ library; so they are those that a step has written, and one is made where none was.
  const std::vector<CacheBuffer>& buffers();
  /// Tokens whose slots were written into the buffers.
  void restored(std::vector<int64_t> tokens) { tokens_ = std::move(tokens), left_ = 0; }

  /// Older tokens that have left, by the program's policy.
  int64_t left() const { return left_; }
  /// Of the cache: one for each position, or fewer where a window goes round in them.
  int64_t slots() const { return slots_; }

  int64_t vocab_size() const { return vocab_size_; }
  int64_t context_length() const { return context_length_; }

 private:
  void check_inputs(const executorch::runtime::MethodMeta& meta);
  int64_t constant(const char* name) const;
  template <class Number>
  std::vector<Number> constants(const char* name) const;
  void read_policy();
  void make_room();
  void execute(const int64_t* tokens, int64_t count);

  std::string path_;
  std::vector<int64_t> tokens_;
  // each outlives those after it
  Loader loader_;
  std::optional<executorch::runtime::Program> program_;
  std::optional<Memory> memory_;
  std::optional<executorch::runtime::Method> method_;
  int64_t vocab_size_ = 0, context_length_ = 0, longest_piece_ = 0;
  int64_t window_ = 0, slots_ = 0;  // tokens that each one attends to: with slots_ the whole context, or those of a window
  int64_t sink_ = -1, left_ = 0;    // tokens that never leave; -1: none ever leaves
  std::vector<double> frequencies_;
  const float* logits_ = nullptr;
};

}  // namespace runner
