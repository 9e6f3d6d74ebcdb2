#include "common/gguf/exercise_for_test.h"

#include <sys/mman.h>
#include <unistd.h>

#include <memory>
#include <string>
#include <vector>

#include "common/base/check.h"
#include "common/gguf/gguf.h"

namespace tandem::gguf {
namespace {

// Keeps the compiler from dropping reads whose result nobody wants.
volatile uint64_t g_sink = 0;

void UseMetadata(const File& file) {
  uint64_t used = 0;
  for (const auto& [key, value] : file.metadata()) {
    TANDEM_CHECK(file.Find(key) == &value);
    used += value.DebugString().size() + value.DebugString(0).size();
    used +=
        file.GetUint(key).ok() + file.GetFloat(key).ok() + file.GetBool(key).ok() + file.GetString(key).ok();
    if (const auto v = file.GetStrings(key); v.ok()) used += v->size();
    if (const auto v = file.GetInts(key); v.ok()) used += v->size();
    if (const auto v = file.GetFloats(key); v.ok()) used += v->size();
  }
  used += file.Fingerprint().size();
  g_sink = g_sink + used;
}

void UseTensors(const File& file, bool with_data) {
  uint64_t used = 0;
  for (const Tensor& tensor : file.tensors()) {
    TANDEM_CHECK(file.FindTensor(tensor.name) == &tensor);
    TANDEM_CHECK(GetTypeInfo(tensor.type).supported);
    used += tensor.ShapeString().size();
    if (!with_data) {
      TANDEM_CHECK(tensor.data == nullptr);
      continue;
    }
    TANDEM_CHECK(tensor.nbytes > 0 && tensor.nbytes <= file.file_bytes());
    TANDEM_CHECK(tensor.file_offset <= file.file_bytes() - tensor.nbytes);
    TANDEM_CHECK(static_cast<uint64_t>(RowBytes(tensor.type, tensor.cols())) <= tensor.nbytes);
    for (uint64_t i = 0; i < tensor.nbytes; ++i) used += tensor.data[i];
  }
  g_sink = g_sink + used;
}

// What was read can be written, and reads back as the same metadata.
void RewriteMetadata(const File& file) {
  Writer writer;
  for (const auto& [key, value] : file.metadata()) writer.AddValue(key, value);
  const std::string first = writer.SerializeMetadata();
  const auto again =
      File::ParseHeader({reinterpret_cast<const uint8_t*>(first.data()), first.size()}, "rewritten");
  TANDEM_CHECK(again.ok());
  Writer second_writer;
  for (const auto& [key, value] : (*again)->metadata()) second_writer.AddValue(key, value);
  TANDEM_CHECK(second_writer.SerializeMetadata() == first);
  TANDEM_CHECK((*again)->metadata().size() == file.metadata().size());
}

}  // namespace

ExerciseResult Exercise(std::span<const uint8_t> bytes) {
  ExerciseResult result;
  {
    // A copy of exactly this size: an address sanitizer sees a read one byte past it.
    const std::unique_ptr<uint8_t[]> copy(new uint8_t[bytes.size()]);
    std::copy(bytes.begin(), bytes.end(), copy.get());
    const auto file = File::ParseHeader({copy.get(), bytes.size()}, "bytes");
    result.header_accepted = file.ok();
    if (file.ok()) {
      UseMetadata(**file);
      UseTensors(**file, false);
      RewriteMetadata(**file);
    } else {
      TANDEM_CHECK(!file.status().message().empty());
    }
  }
  const int fd = memfd_create("gguf-exercise", MFD_CLOEXEC);
  TANDEM_CHECK(fd >= 0);
  TANDEM_CHECK(write(fd, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
  const auto file = File::Open("/proc/self/fd/" + std::to_string(fd));
  close(fd);
  result.file_accepted = file.ok();
  if (file.ok()) {
    TANDEM_CHECK(result.header_accepted);
    UseMetadata(**file);
    UseTensors(**file, true);
  }
  return result;
}

}  // namespace tandem::gguf
