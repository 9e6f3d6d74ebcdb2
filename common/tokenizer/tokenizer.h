// Byte-level BPE (tokenizer.ggml.model = "gpt2") with the pre-tokenizers that DeepSeek's models use.
//
// A text is first cut at its special tokens, then by the pre-tokenizer into pieces, and each piece is merged
// by rank. Control tokens are recognised only with parse_special; user-defined tokens (<think>) always are.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tandem::gguf {
class File;
}  // namespace tandem::gguf

namespace tandem::tokenizer {

// Token types by their GGUF numbers (tokenizer.ggml.token_type).
enum class TokenType : uint8_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6,
};

// What a model file says about its tokenizer. Ids are indices into `tokens`; -1 = none.
struct VocabularySpec {
  std::string model = "gpt2";
  std::string pre = "deepseek-v3";
  std::vector<std::string> tokens;   // normal ones in the byte alphabet of GPT-2, special ones as they are
  std::vector<int32_t> token_types;  // one a token; empty = all normal
  std::vector<std::string> merges;   // "left right", best first
  int64_t bos_id = -1;
  int64_t eos_id = -1;
  int64_t pad_id = -1;
  int64_t eot_id = -1;
  bool add_bos = false;
};

struct EncodeOptions {
  bool add_special = false;    // put BOS in front where the model wants one; never a second one
  bool parse_special = false;  // control tokens in the text become their ids
  // A code point (UTF-8) that is taken out of the text after special tokens were looked for and before the
  // rest is encoded: put inside the spelling of a control token, it makes that plain text. Empty = none.
  std::string_view marker = {};
  // Encoding may end early, with more tokens than this; nobody wants to know how many more there would be.
  size_t most = SIZE_MAX;
};

struct DecodeOptions {
  bool skip_special = false;  // leave control tokens out
};

// Immutable after creation and thread-safe.
class Tokenizer {
 public:
  // InvalidArgument names the key, the index and what is wrong; Unimplemented names an unknown model or
  // pre-tokenizer and those that are supported; NotFound names a key that is missing.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromGguf(const gguf::File& file);
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromVocabulary(VocabularySpec spec);

  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // Any bytes are accepted: what is not UTF-8 is encoded byte by byte and decodes to the same bytes.
  // O(n log n) in the longest piece, O(n) in the rest.
  std::vector<int32_t> Encode(std::string_view text, const EncodeOptions& options) const;
  std::vector<int32_t> Encode(std::string_view text) const { return Encode(text, EncodeOptions()); }

  // The bytes that the tokens stand for, which may be cut within a character at either end. Ids outside of
  // the vocabulary decode to nothing.
  std::string Decode(std::span<const int32_t> ids, const DecodeOptions& options) const;
  std::string Decode(std::span<const int32_t> ids) const { return Decode(ids, DecodeOptions()); }

  // The bytes of one token; empty if `id` is out of range. Valid as long as the tokenizer lives.
  std::string_view TokenBytes(int32_t id) const;
  // The token as the vocabulary spells it ("Ġthe").
  std::string_view TokenText(int32_t id) const;

  int32_t vocab_size() const;
  int32_t bos_id() const;  // -1 if none, as for the others
  int32_t eos_id() const;
  int32_t pad_id() const;
  bool add_bos() const;
  bool IsValid(int32_t id) const { return id >= 0 && id < vocab_size(); }
  bool IsControl(int32_t id) const;
  bool IsUserDefined(int32_t id) const;
  TokenType type(int32_t id) const;  // kUnknown if out of range

  // EOS and the other tokens that end an answer (<|EOT|>, <|im_end|>, ...), ascending.
  std::span<const int32_t> end_of_generation_ids() const;
  bool IsEndOfGeneration(int32_t id) const;

  // The id of a token by its spelling in the vocabulary; -1 if there is none.
  int32_t FindToken(std::string_view text) const;

  // Spellings of all control (or user-defined) tokens, in the order of their ids.
  std::vector<std::string_view> TokensOfType(TokenType type) const;

  // "deepseek-v3"
  const std::string& pre() const;

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Names for tokenizer.ggml.pre that FromVocabulary takes.
std::vector<std::string_view> SupportedPreTokenizers();

// `bytes` as UTF-8: each ill-formed sequence (the longest prefix of a well-formed one, or one byte) becomes
// U+FFFD.
std::string SanitizeUtf8(std::string_view bytes);

// Turns a stream of tokens into a stream of text that is always whole, well-formed UTF-8. The concatenation
// of all Push results and the Flush equals SanitizeUtf8(Decode(all tokens)). One stream each; not
// thread-safe.
class StreamDecoder {
 public:
  // `tokenizer` must outlive the decoder.
  explicit StreamDecoder(const Tokenizer* tokenizer, DecodeOptions options = DecodeOptions())
      : tokenizer_(tokenizer), options_(options) {}

  // The text that is complete with this token; empty while a character is under way.
  std::string Push(int32_t id);
  // What is left at the end: U+FFFD for an unfinished character. The decoder can then be used anew.
  std::string Flush();

 private:
  const Tokenizer* tokenizer_;
  DecodeOptions options_;
  std::string held_;  // the first bytes of a character, at most 3
};

}  // namespace tandem::tokenizer
