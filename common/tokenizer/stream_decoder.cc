#include "common/tokenizer/tokenizer.h"
#include "common/tokenizer/unicode.h"

namespace tandem::tokenizer {

std::string StreamDecoder::Push(int32_t id) {
  if (!tokenizer_->IsValid(id) || (options_.skip_special && tokenizer_->IsControl(id))) return "";
  held_.append(tokenizer_->TokenBytes(id));
  const size_t held = IncompleteUtf8Suffix(held_);
  std::string out = SanitizeUtf8(std::string_view(held_).substr(0, held_.size() - held));
  held_.erase(0, held_.size() - held);
  return out;
}

std::string StreamDecoder::Flush() {
  std::string out = SanitizeUtf8(held_);
  held_.clear();
  return out;
}

}  // namespace tandem::tokenizer
