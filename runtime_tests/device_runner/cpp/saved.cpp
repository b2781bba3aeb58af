#include "saved.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "base/checksums.h"
#include "base/error.h"

namespace runner {
namespace {

constexpr char kMagic[] = "KVCACHE\n";
constexpr uint32_t kVersion = 1, kMostNote = 1U << 24;
constexpr size_t kPiece = 1U << 20;

struct Head {
  char magic[8];
  uint32_t version;
  uint8_t artifact[32];
  uint32_t tokens, note_bytes;
};
static_assert(sizeof(Head) == 52, "as it lies in the file");

[[noreturn]] void refuse(const std::string& path, const std::string& why) { throw Failure(Stage::run, path + ": " + why); }

using File = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

/// SHA-256 of the manifest beside the model.
Sha256 artifact_of(const Model& model) {
  const size_t folder = model.path().rfind('/') + 1;  // 0 without one
  const std::string path = model.path().substr(0, folder) + "manifest.json";
  const File file(std::fopen(path.c_str(), "rb"), std::fclose);
  std::string text;
  char part[1 << 14];
  for (size_t got; file && (got = std::fread(part, 1, sizeof part, file.get())) > 0;) text.append(part, got);
  if (!file || std::ferror(file.get())) refuse(path, "cannot be read, and a saved session is bound to it");
  return sha256(text);
}

Head head_of(const Model& model) {
  Head head = {{}, kVersion, {}, static_cast<uint32_t>(model.tokens().size()), 0};
  std::memcpy(head.magic, kMagic, sizeof head.magic);
  const Sha256 artifact = artifact_of(model);
  std::copy(artifact.begin(), artifact.end(), head.artifact);
  return head;
}

/// Whether there is a file of that name, and it begins as a saved session.
bool is_saved(const std::string& path) {
  struct stat status {};
  if (stat(path.c_str(), &status) != 0 || !S_ISREG(status.st_mode)) return false;
  const File file(std::fopen(path.c_str(), "rb"), std::fclose);
  char magic[8];
  return file && std::fread(magic, 1, sizeof magic, file.get()) == sizeof magic &&
         std::memcmp(magic, kMagic, sizeof magic) == 0;
}

/// A file that is read to its end, every part of it counted in the checksum.
class Reading {
 public:
  explicit Reading(const std::string& path) : path_(path) {
    struct stat status {};
    if (stat(path.c_str(), &status) != 0) refuse(path, "no such file");
    if (!S_ISREG(status.st_mode)) refuse(path, "no file");  // to open a pipe would wait for its writer
    file_.reset(std::fopen(path.c_str(), "rb"));
    if (!file_) refuse(path, std::string("cannot be read: ") + std::strerror(errno));
    size_ = status.st_size;
  }
  int64_t size() const { return size_; }
  void read(void* data, size_t count) {
    if (std::fread(data, 1, count, file_.get()) != count) refuse(path_, "no saved session");
  }
  void rewind_to(size_t at) { std::fseek(file_.get(), static_cast<long>(at), SEEK_SET); }

 private:
  std::string path_;
  File file_{nullptr, std::fclose};
  int64_t size_ = 0;
};

/// The head of a file after every check; the file stands behind it.
Head checked(Reading& file, const std::string& path, const Model& model, int64_t slot_bytes) {
  Head head, own = head_of(model);
  file.read(&head, sizeof head);
  if (std::memcmp(head.magic, kMagic, sizeof head.magic) != 0) refuse(path, "no saved session");
  if (head.version != kVersion)
    refuse(path, "a saved session of version " + std::to_string(head.version) + ", this program reads 1; save it again");
  if (std::memcmp(head.artifact, own.artifact, sizeof head.artifact) != 0) refuse(path, "saved with another artifact");
  if (head.tokens > model.slots())
    refuse(path, std::to_string(head.tokens) + " tokens, the KV cache has room for " + std::to_string(model.slots()));
  const int64_t expected = sizeof head + int64_t{head.tokens} * (4 + slot_bytes) + head.note_bytes + 4;
  if (head.note_bytes > kMostNote || file.size() != expected)
    refuse(path, "damaged: " + std::to_string(file.size()) + " bytes instead of " + std::to_string(expected));
  uint32_t crc = crc32(0, &head, sizeof head), stored = 0;
  std::vector<char> piece(kPiece);
  for (int64_t left = expected - sizeof head - 4; left > 0;) {
    const size_t count = std::min<int64_t>(left, piece.size());
    file.read(piece.data(), count);
    crc = crc32(crc, piece.data(), count), left -= count;
  }
  file.read(&stored, sizeof stored);
  if (crc != stored) refuse(path, "damaged: its CRC-32 is another; copy or save it again");
  file.rewind_to(sizeof head);
  return head;
}

}  // namespace

int64_t save(Model& model, const std::string& path) {
  struct stat status {};
  if (stat(path.c_str(), &status) == 0 && !is_saved(path)) refuse(path, "is there and no saved session; choose another name");
  if (model.left() > 0)  // what they did to those that stay cannot be told from the tokens in the file
    throw Failure(
        Stage::run, std::to_string(model.left()) + " older tokens have left this cache, by its policy; save before any has");
  const Head head = head_of(model);
  const std::vector<uint32_t> tokens(model.tokens().begin(), model.tokens().end());
  std::vector<std::pair<const void*, size_t>> parts = {{&head, sizeof head}, {tokens.data(), tokens.size() * 4}};
  for (const auto& buffer : model.buffers()) parts.emplace_back(buffer.data, tokens.size() * buffer.slot_bytes);
  uint32_t crc = 0;
  for (const auto& [data, count] : parts) crc = crc32(crc, data, count);
  parts.emplace_back(&crc, sizeof crc);
  const std::string unfinished = path + ".part";
  File file(std::fopen(unfinished.c_str(), "wb"), std::fclose);
  int64_t size = 0;
  bool written = file != nullptr;
  for (const auto& [data, count] : parts) {
    written = written && std::fwrite(data, 1, count, file.get()) == count;
    size += count;
  }
  written = file && std::fclose(file.release()) == 0 && written;
  if (written && std::rename(unfinished.c_str(), path.c_str()) == 0) return size;
  const std::string why = std::strerror(errno);
  std::remove(unfinished.c_str());
  refuse(path, "cannot be written: " + why);
}

void restore(Model& model, const std::string& path) {
  const auto& buffers = model.buffers();
  int64_t slot_bytes = 0;
  for (const auto& buffer : buffers) slot_bytes += buffer.slot_bytes;
  Reading file(path);
  const Head head = checked(file, path, model, slot_bytes);
  std::vector<uint32_t> tokens(head.tokens);
  file.read(tokens.data(), tokens.size() * 4);
  for (const uint32_t token : tokens)
    if (token >= model.vocab_size()) refuse(path, "damaged: token " + std::to_string(token) + " is not in the vocabulary");
  std::string note(head.note_bytes, '\0');
  file.read(note.data(), note.size());
  model.rewind(0);
  for (const auto& buffer : buffers) file.read(buffer.data, head.tokens * buffer.slot_bytes);
  model.restored({tokens.begin(), tokens.end()});
}

}  // namespace runner
