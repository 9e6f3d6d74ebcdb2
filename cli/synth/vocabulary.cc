#include "cli/synth/vocabulary.h"

#include <iterator>

#include "absl/strings/str_cat.h"

namespace tandem::cli {
namespace {

constexpr int32_t kNormal = 1, kControl = 3, kUserDefined = 4, kUnused = 5;

constexpr const char* kFront[] = {"<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"};
constexpr const char* kBack[] = {"<think>",
                                 "</think>",
                                 "<｜fim▁hole｜>",
                                 "<｜fim▁begin｜>",
                                 "<｜fim▁end｜>",
                                 "<｜User｜>",
                                 "<｜Assistant｜>",
                                 "<|EOT|>",
                                 "<｜tool▁calls▁begin｜>",
                                 "<｜tool▁calls▁end｜>",
                                 "<｜tool▁call▁begin｜>",
                                 "<｜tool▁call▁end｜>",
                                 "<｜tool▁outputs▁begin｜>",
                                 "<｜tool▁outputs▁end｜>",
                                 "<｜tool▁output▁begin｜>",
                                 "<｜tool▁output▁end｜>",
                                 "<｜tool▁sep｜>"};
constexpr auto kFrontTokens = static_cast<int64_t>(std::size(kFront));
constexpr auto kBackTokens = static_cast<int64_t>(std::size(kBack));
constexpr int64_t kSmallest = kFrontTokens + 256 + kBackTokens;
// DeepSeek-V3's.
constexpr int64_t kFullSize = 129280;
constexpr int64_t kFullWordsEnd = 128000;
constexpr int64_t kFullBackBegin = 128798;

std::string Utf8(uint32_t c) {  // below U+0800
  if (c < 0x80) return std::string(1, static_cast<char>(c));
  return {static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 63))};
}

// GPT-2's alphabet of bytes: the printable ones of Latin-1 are themselves, the others count on from U+0100.
std::vector<std::string> ByteAlphabet() {
  std::vector<std::string> out;
  uint32_t next = 256;
  for (uint32_t b = 0; b < 256; ++b) {
    const bool printable = (b > 32 && b < 127) || (b > 160 && b != 173);
    out.push_back(Utf8(printable ? b : next++));
  }
  return out;
}

}  // namespace

absl::StatusOr<SynthVocabulary> MakeVocabulary(int64_t size) {
  if (size < kSmallest) {
    return absl::InvalidArgumentError(
        absl::StrCat("a vocabulary of ", size, " tokens: at least ", kSmallest, " are needed"));
  }
  SynthVocabulary v;
  const auto add = [&v](std::string token, int32_t type) {
    v.tokens.push_back(std::move(token));
    v.types.push_back(type);
  };
  const auto count = [&v] { return static_cast<int64_t>(v.tokens.size()); };
  const bool full = size >= kFullSize;
  const int64_t words_end = full ? kFullWordsEnd : size - kBackTokens;

  for (const char* token : kFront) add(token, kControl);
  const std::vector<std::string> bytes = ByteAlphabet();
  for (const std::string& byte : bytes) add(byte, kNormal);
  // Words: every word so far, from the shortest on, and a letter behind it.
  std::vector<std::string> words = {bytes[' ']};
  for (char c = 'a'; c <= 'z'; ++c) words.emplace_back(1, c);
  for (size_t left = 0; count() < words_end; ++left) {
    for (char c = 'a'; c <= 'z' && count() < words_end; ++c) {
      v.merges.push_back(absl::StrCat(words[left], " ", std::string(1, c)));
      words.push_back(words[left] + c);
      add(words.back(), kNormal);
    }
  }
  for (int64_t i = 0; full && count() < kFullBackBegin; ++i) {
    add(absl::StrCat("<｜place▁holder▁no▁", i, "｜>"), kControl);
  }
  for (const char* token : kBack) {
    const std::string text = token;
    add(text, text == "<think>" || text == "</think>" ? kUserDefined : kControl);
  }
  while (count() < size) add(absl::StrCat("[PAD", count(), "]"), kUnused);
  return v;
}

std::string SynthChatTemplate() {
  return "{{ bos_token }}{% for message in messages %}"
         "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
         "{% elif message['role'] == 'assistant' %}"
         "{{ '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}"
         "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}";
}

}  // namespace tandem::cli
