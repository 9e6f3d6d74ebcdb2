// Helpers of this folder's tests.
#pragma once

#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "common/tokenizer/tokenizer.h"

namespace tandem::tokenizer {

// A path under $TANDEM_SOURCE_DIR (the current folder if unset).
std::string SourcePath(const std::string& relative);

// A path under $TANDEM_SHARED or <source>/../shared; nullopt if nothing is there.
std::optional<std::string> SharedPath(const std::string& relative);

// The whole file; empty if it cannot be read.
std::string ReadFile(const std::string& path);

// A Hugging Face tokenizer.json as a vocabulary, in the way GGUF converters do it: added tokens are control
// tokens except <think> and </think>.
absl::StatusOr<VocabularySpec> SpecFromTokenizerJson(const std::string& path);

// All 256 byte tokens (in the byte alphabet) after BOS, EOS and PAD, then tokens for `merges`, then
// `special`: a small vocabulary that encodes every text.
VocabularySpec TinySpec();

}  // namespace tandem::tokenizer
