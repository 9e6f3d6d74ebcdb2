// Building a Tokenizer: everything that a model file says about its vocabulary is checked here.
#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status_macros.h"
#include "common/gguf/gguf.h"
#include "common/tokenizer/tokenizer_impl.h"
#include "common/tokenizer/unicode.h"

namespace tandem::tokenizer {
namespace {

constexpr size_t kMaxTokens = size_t{1} << 24;

// GPT-2's byte alphabet: printable Latin-1 bytes are themselves, the 68 others are U+0100 and up, in order.
bool IsItself(uint32_t byte) {
  return (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || (byte >= 174 && byte <= 255);
}

// The byte that a character of the alphabet stands for; -1 for other characters.
class ByteAlphabet {
 public:
  ByteAlphabet() {
    std::fill(std::begin(byte_of_), std::end(byte_of_), -1);
    int next = 256;
    for (int b = 0; b < 256; ++b) {
      const int c = IsItself(b) ? b : next++;
      byte_of_[c] = static_cast<int16_t>(b);
      AppendUtf8(c, &spelling_[b]);
    }
  }
  int ByteOf(uint32_t c) const { return c < 512 ? byte_of_[c] : -1; }
  const std::string& Spelling(int byte) const { return spelling_[byte]; }

 private:
  int16_t byte_of_[512];
  std::string spelling_[256];
};

const ByteAlphabet& Alphabet() {
  static const ByteAlphabet* const alphabet = new ByteAlphabet;
  return *alphabet;
}

// The bytes of a token spelled in the alphabet; nullopt if it has other characters.
std::optional<std::string> FromAlphabet(std::string_view token) {
  std::string out;
  for (size_t i = 0; i < token.size();) {
    size_t length;
    const int byte = Alphabet().ByteOf(DecodeUtf8(token, i, &length));
    if (byte < 0) return std::nullopt;
    out.push_back(static_cast<char>(byte));
    i += length;
  }
  return out;
}

bool IsWellFormed(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    size_t length;
    if (DecodeUtf8(text, i, &length) == kInvalidCodePoint) return false;
    i += length;
  }
  return true;
}

bool LooksLikeControl(std::string_view token) {
  return (token.starts_with("<|") && token.ends_with("|>") && token.size() > 4) ||
         (token.starts_with("<\xEF\xBD\x9C") && token.ends_with("\xEF\xBD\x9C>") && token.size() > 8);
}

// For messages: quoted, cut, with what is not printable escaped.
std::string Quote(std::string_view text) {
  std::string out = "\"";
  for (const char c : text.substr(0, 60)) {
    if (c == '"' || c == '\\') out.push_back('\\');
    if (static_cast<unsigned char>(c) < 0x20) {
      absl::StrAppend(&out, "\\x", absl::Hex(static_cast<unsigned char>(c), absl::kZeroPad2));
    } else {
      out.push_back(c);
    }
  }
  return absl::StrCat(SanitizeUtf8(out), text.size() > 60 ? "...\"" : "\"");
}

// "<0x41>", how byte tokens (type 6) are spelled; -1 if `token` is not of that form.
int ParseByteToken(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return -1;
  int value = 0;
  for (const char c : token.substr(3, 2)) {
    const int digit = c >= '0' && c <= '9'                     ? c - '0'
                      : (c | 0x20) >= 'a' && (c | 0x20) <= 'f' ? (c | 0x20) - 'a' + 10
                                                               : -1;
    if (digit < 0) return -1;
    value = value * 16 + digit;
  }
  return value;
}

constexpr std::string_view kEndTokens[] = {"<｜end▁of▁sentence｜>",
                                           "<|end_of_sentence|>",
                                           "<|EOT|>",
                                           "<|eot_id|>",
                                           "<|im_end|>",
                                           "<|end|>",
                                           "<|eom_id|>",
                                           "<|endoftext|>",
                                           "<|end_of_text|>",
                                           "[EOS]",
                                           "[EOT]"};

}  // namespace

absl::Status Tokenizer::Impl::Build(VocabularySpec s) {
  spec = std::move(s);
  if (spec.model != "gpt2") {
    return absl::UnimplementedError(absl::StrCat("tokenizer.ggml.model ", Quote(spec.model),
                                                 " is not supported; supported: \"gpt2\" (byte-level BPE)"));
  }
  pre_tokenizer = FindPreTokenizer(spec.pre);
  if (pre_tokenizer == nullptr) {
    std::string names;
    for (const std::string_view name : SupportedPreTokenizers()) {
      absl::StrAppend(&names, names.empty() ? "" : ", ", std::string(name));
    }
    return absl::UnimplementedError(
        absl::StrCat("tokenizer.ggml.pre ", Quote(spec.pre), " is not supported; supported: ", names));
  }
  TANDEM_RETURN_IF_ERROR(BuildTokens());
  TANDEM_RETURN_IF_ERROR(BuildMerges());
  return BuildSpecials();
}

absl::Status Tokenizer::Impl::BuildTokens() {
  const size_t n = spec.tokens.size();
  if (n == 0 || n > kMaxTokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("tokenizer.ggml.tokens has ", n, " entries; 1 to ", kMaxTokens, " are supported"));
  }
  if (!spec.token_types.empty() && spec.token_types.size() != n) {
    return absl::InvalidArgumentError(absl::StrCat("tokenizer.ggml.token_type has ", spec.token_types.size(),
                                                   " entries, tokenizer.ggml.tokens has ", n));
  }
  bytes.resize(n);
  types.resize(n, TokenType::kNormal);
  by_text.reserve(n);
  by_bytes.reserve(n);
  std::fill(std::begin(byte_ids), std::end(byte_ids), -1);
  for (size_t i = 0; i < n; ++i) {
    const std::string& token = spec.tokens[i];
    if (token.empty())
      return absl::InvalidArgumentError(absl::StrCat("tokenizer.ggml.tokens[", i, "] is empty"));
    if (!IsWellFormed(token)) {
      return absl::InvalidArgumentError(
          absl::StrCat("tokenizer.ggml.tokens[", i, "] ", Quote(token), " is not UTF-8"));
    }
    const auto id = static_cast<int32_t>(i);
    if (const auto [it, is_new] = by_text.emplace(token, id); !is_new) {
      return absl::InvalidArgumentError(absl::StrCat("tokenizer.ggml.tokens[", i, "] ", Quote(token),
                                                     " is the same as tokenizer.ggml.tokens[", it->second,
                                                     "]"));
    }
    if (!spec.token_types.empty()) {
      const int32_t type = spec.token_types[i];
      if (type < 1 || type > 6) {
        return absl::InvalidArgumentError(
            absl::StrCat("tokenizer.ggml.token_type[", i, "] is ", type, "; known are 1 to 6"));
      }
      types[i] = static_cast<TokenType>(type);
    }
    // Some converters call control tokens user-defined or normal. Text must not be able to make these.
    if ((types[i] == TokenType::kNormal || types[i] == TokenType::kUserDefined) && LooksLikeControl(token) &&
        (types[i] == TokenType::kUserDefined || !FromAlphabet(token))) {
      types[i] = TokenType::kControl;
    }
    bytes[i] = token;
    if (types[i] == TokenType::kNormal) {
      if (auto decoded = FromAlphabet(token)) {
        bytes[i] = *std::move(decoded);
        by_bytes.emplace(bytes[i], id);
        longest_token = std::max(longest_token, bytes[i].size());
        if (bytes[i].size() == 1) byte_ids[static_cast<unsigned char>(bytes[i][0])] = id;
      }
    } else if (types[i] == TokenType::kByte) {
      const int byte = ParseByteToken(token);
      if (byte < 0) {
        return absl::InvalidArgumentError(
            absl::StrCat("tokenizer.ggml.tokens[", i, "] ", Quote(token),
                         " has the type of a byte token but not its form <0xNN>"));
      }
      bytes[i] = std::string(1, static_cast<char>(byte));
    }
    longest_of_all = std::max({longest_of_all, bytes[i].size(), token.size()});
  }
  for (int b = 0; b < 256; ++b) {
    if (byte_ids[b] >= 0) continue;
    return absl::InvalidArgumentError(absl::StrCat("tokenizer.ggml.tokens has no token for the byte ", b,
                                                   " (", Quote(Alphabet().Spelling(b)),
                                                   "); byte-level BPE needs all 256"));
  }
  whole = std::make_unique<std::atomic<uint8_t>[]>(n);
  return absl::OkStatus();
}

absl::Status Tokenizer::Impl::BuildMerges() {
  merges = std::make_unique<MergeTable>(spec.merges.size());
  std::string joined;
  for (size_t i = 0; i < spec.merges.size(); ++i) {
    const std::string_view merge = spec.merges[i];
    const auto error = [&](std::string_view what) {
      return absl::InvalidArgumentError(
          absl::StrCat("tokenizer.ggml.merges[", i, "] ", Quote(merge), ": ", std::string(what)));
    };
    const size_t space = merge.find(' ');
    if (space == std::string_view::npos || space == 0 || space + 1 == merge.size() ||
        merge.find(' ', space + 1) != std::string_view::npos) {
      return error("not two tokens with one space between them");
    }
    const std::string_view left = merge.substr(0, space);
    const std::string_view right = merge.substr(space + 1);
    joined.assign(left);
    joined.append(right);
    int32_t ids[3];
    const std::string_view parts[3] = {left, right, joined};
    for (int k = 0; k < 3; ++k) {
      const auto it = by_text.find(parts[k]);
      if (it == by_text.end() || types[it->second] != TokenType::kNormal) {
        return error(absl::StrCat(Quote(parts[k]), " is not a normal token of the vocabulary"));
      }
      ids[k] = it->second;
    }
    merges->Add(ids[0], ids[1], static_cast<uint32_t>(i), ids[2]);
  }
  spec.merges.clear();  // the table holds all of it
  spec.merges.shrink_to_fit();
  return absl::OkStatus();
}

absl::Status Tokenizer::Impl::BuildSpecials() {
  const struct {
    const char* key;
    int64_t id;
  } named[] = {{"tokenizer.ggml.bos_token_id", spec.bos_id},
               {"tokenizer.ggml.eos_token_id", spec.eos_id},
               {"tokenizer.ggml.padding_token_id", spec.pad_id},
               {"tokenizer.ggml.eot_token_id", spec.eot_id}};
  for (const auto& [key, id] : named) {
    if (id == -1) continue;
    if (id < 0 || id >= static_cast<int64_t>(spec.tokens.size())) {
      return absl::InvalidArgumentError(
          absl::StrCat(key, " is ", id, ", outside of the vocabulary of ", spec.tokens.size()));
    }
  }
  if (spec.add_bos && spec.bos_id < 0) {
    return absl::InvalidArgumentError(
        "tokenizer.ggml.add_bos_token is set but tokenizer.ggml.bos_token_id is absent");
  }
  for (size_t i = 0; i < types.size(); ++i) {
    const bool is_control = types[i] == TokenType::kControl || types[i] == TokenType::kUnknown;
    if (!is_control && types[i] != TokenType::kUserDefined) continue;
    if (bytes[i].size() > SpecialMatcher::kMaxSpelling) {
      return absl::InvalidArgumentError(
          absl::StrCat("tokenizer.ggml.tokens[", i, "] ", Quote(bytes[i]), " has ", bytes[i].size(),
                       " bytes; a special token may have ", SpecialMatcher::kMaxSpelling));
    }
    all_special.Add(bytes[i], static_cast<int32_t>(i));
    if (!is_control) user_defined.Add(bytes[i], static_cast<int32_t>(i));
  }
  for (const int64_t id : {spec.eos_id, spec.eot_id}) {
    if (id >= 0) end_of_generation.push_back(static_cast<int32_t>(id));
  }
  for (const std::string_view text : kEndTokens) {
    const auto it = by_text.find(text);
    if (it != by_text.end() && types[it->second] == TokenType::kControl)
      end_of_generation.push_back(it->second);
  }
  std::sort(end_of_generation.begin(), end_of_generation.end());
  end_of_generation.erase(std::unique(end_of_generation.begin(), end_of_generation.end()),
                          end_of_generation.end());
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromGguf(const gguf::File& file) {
  VocabularySpec spec;
  TANDEM_ASSIGN_OR_RETURN(spec.model, file.GetString("tokenizer.ggml.model"));
  if (file.Find("tokenizer.ggml.pre") != nullptr) {
    TANDEM_ASSIGN_OR_RETURN(spec.pre, file.GetString("tokenizer.ggml.pre"));
  } else if (spec.model == "gpt2") {
    return absl::NotFoundError(
        "tokenizer.ggml.pre is absent: how this model splits text before BPE is unknown");
  }
  TANDEM_ASSIGN_OR_RETURN(const std::span<const std::string> tokens,
                          file.GetStrings("tokenizer.ggml.tokens"));
  spec.tokens.assign(tokens.begin(), tokens.end());
  if (spec.model == "gpt2") {
    TANDEM_ASSIGN_OR_RETURN(const std::span<const std::string> merges,
                            file.GetStrings("tokenizer.ggml.merges"));
    spec.merges.assign(merges.begin(), merges.end());
  }
  if (file.Find("tokenizer.ggml.token_type") != nullptr) {
    TANDEM_ASSIGN_OR_RETURN(const std::vector<int64_t> types, file.GetInts("tokenizer.ggml.token_type"));
    if (types.empty()) return absl::InvalidArgumentError("tokenizer.ggml.token_type is empty");
    for (const int64_t type : types) {
      spec.token_types.push_back(type < 1 || type > 6 ? -1 : static_cast<int32_t>(type));
    }
  }
  const struct {
    const char* key;
    int64_t* id;
  } named[] = {{"tokenizer.ggml.bos_token_id", &spec.bos_id},
               {"tokenizer.ggml.eos_token_id", &spec.eos_id},
               {"tokenizer.ggml.padding_token_id", &spec.pad_id},
               {"tokenizer.ggml.eot_token_id", &spec.eot_id}};
  for (const auto& [key, id] : named) {
    if (file.Find(key) == nullptr) continue;
    TANDEM_ASSIGN_OR_RETURN(const uint64_t value, file.GetUint(key));
    if (value >= tokens.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat(key, " is ", value, ", outside of the vocabulary of ", tokens.size()));
    }
    *id = static_cast<int64_t>(value);
  }
  // Where the file does not say: DeepSeek's models want BOS, Kimi's do not.
  spec.add_bos = spec.bos_id >= 0 && spec.pre.starts_with("deepseek");
  if (file.Find("tokenizer.ggml.add_bos_token") != nullptr) {
    TANDEM_ASSIGN_OR_RETURN(spec.add_bos, file.GetBool("tokenizer.ggml.add_bos_token"));
  }
  return FromVocabulary(std::move(spec));
}

}  // namespace tandem::tokenizer
