#include "common/tokenizer/tokenizer.h"

#include <algorithm>
#include <utility>

#include "common/tokenizer/tokenizer_impl.h"
#include "common/tokenizer/unicode.h"

namespace tandem::tokenizer {
namespace {

// Texts are encoded in stretches of at most this many bytes, so that positions fit 32 bits.
constexpr size_t kMaxStretch = size_t{1} << 30;

void EraseAll(std::string_view what, std::string* text) {
  size_t write = text->find(what);
  if (what.empty() || write == std::string::npos) return;
  size_t read = write;
  while (read < text->size()) {
    const size_t next = text->find(what, read);
    const size_t end = next == std::string::npos ? text->size() : next;
    std::move(text->begin() + read, text->begin() + end, text->begin() + write);
    write += end - read;
    read = next == std::string::npos ? end : end + what.size();
  }
  text->resize(write);
}

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromVocabulary(VocabularySpec spec) {
  auto impl = std::make_unique<Impl>();
  if (absl::Status status = impl->Build(std::move(spec)); !status.ok()) return status;
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(impl)));
}

void Tokenizer::Impl::EncodePiece(std::string_view piece, BpeMerger* merger, std::vector<int32_t>* symbols,
                                  std::vector<int32_t>* out) const {
  if (piece.size() == 1) {
    out->push_back(byte_ids[static_cast<unsigned char>(piece[0])]);
    return;
  }
  // Most pieces are a token as a whole, and most such tokens are what BPE makes of them.
  std::atomic<uint8_t>* state = nullptr;
  int32_t id = -1;
  if (piece.size() <= longest_token) {
    if (const auto it = by_bytes.find(piece); it != by_bytes.end()) {
      id = it->second;
      state = &whole[id];
      if (state->load(std::memory_order_relaxed) == kWholeYes) {
        out->push_back(id);
        return;
      }
    }
  }
  symbols->clear();
  for (const char c : piece) symbols->push_back(byte_ids[static_cast<unsigned char>(c)]);
  const size_t before = out->size();
  merger->Merge(*symbols, out);
  if (state != nullptr) {
    const bool is_whole = out->size() == before + 1 && out->back() == id;
    state->store(is_whole ? kWholeYes : kWholeNo, std::memory_order_relaxed);
  }
}

void Tokenizer::Impl::EncodePlain(std::string_view text, size_t most, std::vector<int32_t>* out) const {
  if (text.empty()) return;
  BpeMerger merger(merges.get());
  std::vector<ClassedChar> chars;
  std::vector<uint32_t> ends;
  std::vector<int32_t> symbols;
  out->reserve(out->size() + std::min(text.size() / 3, most));
  while (!text.empty()) {
    size_t stretch = text.size();
    if (stretch > kMaxStretch) {
      stretch = kMaxStretch;
      stretch -= IncompleteUtf8Suffix(text.substr(0, stretch));
    }
    chars.clear();
    ends.clear();
    Classify(text.substr(0, stretch), &chars);
    pre_tokenizer(chars, &ends);
    size_t begin = 0;
    size_t i = 0;
    for (const uint32_t end : ends) {
      size_t length = 0;
      for (; i < end; ++i) length += chars[i].byte_length();
      if (out->size() > most) return;
      EncodePiece(text.substr(begin, length), &merger, &symbols, out);
      begin += length;
    }
    text.remove_prefix(stretch);
  }
}

std::vector<int32_t> Tokenizer::Encode(std::string_view text, const EncodeOptions& options) const {
  std::vector<int32_t> out;
  const SpecialMatcher& matcher = options.parse_special ? impl_->all_special : impl_->user_defined;
  const bool has_marker = !options.marker.empty() && text.find(options.marker) != std::string_view::npos;
  std::string unmarked;
  // So many bytes have more tokens, also when every other byte is a marker's.
  if (options.most < text.size() / (2 * impl_->longest_of_all + 1)) {
    size_t enough = (options.most + 1) * 2 * impl_->longest_of_all;
    enough -= IncompleteUtf8Suffix(text.substr(0, enough));
    text = text.substr(0, enough);
  }
  size_t begin = 0;
  while (begin < text.size() && out.size() <= options.most) {
    const SpecialMatcher::Match match = matcher.Find(text, begin);
    std::string_view plain = text.substr(begin, match.begin - begin);
    if (has_marker) {
      unmarked.assign(plain);
      EraseAll(options.marker, &unmarked);
      plain = unmarked;
    }
    impl_->EncodePlain(plain, options.most, &out);
    if (match.id >= 0) out.push_back(match.id);
    begin = match.end;
  }
  if (options.add_special && impl_->spec.add_bos && (out.empty() || out.front() != bos_id())) {
    out.insert(out.begin(), bos_id());
  }
  return out;
}

std::string Tokenizer::Decode(std::span<const int32_t> ids, const DecodeOptions& options) const {
  std::string out;
  for (const int32_t id : ids) {
    if (options.skip_special && IsControl(id)) continue;
    out.append(TokenBytes(id));
  }
  return out;
}

std::string_view Tokenizer::TokenBytes(int32_t id) const {
  return IsValid(id) ? std::string_view(impl_->bytes[id]) : std::string_view();
}

std::string_view Tokenizer::TokenText(int32_t id) const {
  return IsValid(id) ? std::string_view(impl_->spec.tokens[id]) : std::string_view();
}

int32_t Tokenizer::vocab_size() const { return static_cast<int32_t>(impl_->spec.tokens.size()); }
int32_t Tokenizer::bos_id() const { return static_cast<int32_t>(impl_->spec.bos_id); }
int32_t Tokenizer::eos_id() const { return static_cast<int32_t>(impl_->spec.eos_id); }
int32_t Tokenizer::pad_id() const { return static_cast<int32_t>(impl_->spec.pad_id); }
bool Tokenizer::add_bos() const { return impl_->spec.add_bos; }
bool Tokenizer::IsControl(int32_t id) const { return type(id) == TokenType::kControl; }
bool Tokenizer::IsUserDefined(int32_t id) const { return type(id) == TokenType::kUserDefined; }
TokenType Tokenizer::type(int32_t id) const { return IsValid(id) ? impl_->types[id] : TokenType::kUnknown; }
const std::string& Tokenizer::pre() const { return impl_->spec.pre; }

std::span<const int32_t> Tokenizer::end_of_generation_ids() const { return impl_->end_of_generation; }

bool Tokenizer::IsEndOfGeneration(int32_t id) const {
  return std::binary_search(impl_->end_of_generation.begin(), impl_->end_of_generation.end(), id);
}

int32_t Tokenizer::FindToken(std::string_view text) const {
  const auto it = impl_->by_text.find(text);
  return it == impl_->by_text.end() ? -1 : it->second;
}

std::vector<std::string_view> Tokenizer::TokensOfType(TokenType type) const {
  std::vector<std::string_view> out;
  for (size_t i = 0; i < impl_->types.size(); ++i) {
    if (impl_->types[i] == type) out.push_back(impl_->spec.tokens[i]);
  }
  return out;
}

}  // namespace tandem::tokenizer
