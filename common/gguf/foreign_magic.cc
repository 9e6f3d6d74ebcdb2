// Says what a file is that was taken for a GGUF model and is not one.
#include <cctype>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/gguf/header_parser.h"

namespace tandem::gguf::internal {
namespace {

bool StartsWith(std::span<const uint8_t> bytes, std::string_view prefix) {
  return bytes.size() >= prefix.size() && std::memcmp(bytes.data(), prefix.data(), prefix.size()) == 0;
}

// A safetensors file starts with the u64 length of a JSON header, then the header.
bool LooksLikeSafetensors(std::span<const uint8_t> bytes) {
  if (bytes.size() < 10 || bytes[8] != '{') return false;
  uint64_t length;
  std::memcpy(&length, bytes.data(), sizeof length);
  return length >= 2 && length < (uint64_t{1} << 32);
}

std::string_view Guess(std::span<const uint8_t> bytes) {
  if (StartsWith(bytes, "version https://git-lfs")) {
    return "it looks like a git-lfs pointer, not the model itself: run `git lfs pull`";
  }
  if (StartsWith(bytes, "<!DOCTYPE") || StartsWith(bytes, "<!doctype") || StartsWith(bytes, "<html")) {
    return "it looks like a web page, probably of a failed download: download it again";
  }
  if (LooksLikeSafetensors(bytes)) {
    return "it looks like safetensors: convert the model to GGUF (llama.cpp's convert_hf_to_gguf.py), or "
           "take a "
           "GGUF "
           "download";
  }
  if (StartsWith(bytes, std::string_view("PK\x03\x04", 4)) ||
      StartsWith(bytes, std::string_view("\x80\x02", 2))) {
    return "it looks like a PyTorch checkpoint or a zip archive: convert the model to GGUF, or take a GGUF "
           "download";
  }
  if (StartsWith(bytes, std::string_view("\x1f\x8b", 2))) return "it looks like gzip: decompress it first";
  if (StartsWith(bytes, std::string_view("\x28\xb5\x2f\xfd", 4)))
    return "it looks like zstd: decompress it first";
  if (StartsWith(bytes, std::string_view("\xfd"
                                         "7zXZ",
                                         5)))
    return "it looks like xz: decompress it first";
  if (StartsWith(bytes, "lmgg") || StartsWith(bytes, "tjgg") || StartsWith(bytes, "fmgg")) {
    return "it looks like a GGML file from before GGUF: take a GGUF download";
  }
  if (StartsWith(bytes, "FUGG")) return "it looks like a GGUF file with its bytes swapped";
  if (StartsWith(bytes, "{")) return "it looks like JSON: give the .gguf file itself";
  return "no model format known here: check the path and the download";
}

}  // namespace

std::string DescribeForeignMagic(std::span<const uint8_t> bytes) {
  if (bytes.empty()) return "the file is empty (0 bytes)";
  if (bytes.size() < 4) return absl::StrCat("the file has only ", bytes.size(), " bytes");
  std::string magic;
  for (size_t i = 0; i < 4; ++i) absl::StrAppendFormat(&magic, "%s%02x", i == 0 ? "" : " ", bytes[i]);
  const std::string_view guess = Guess(bytes);
  return absl::StrCat("its first bytes are ", magic,
                      " (GGUF is 47 47 55 46): ", absl::string_view(guess.data(), guess.size()));
}

}  // namespace tandem::gguf::internal
