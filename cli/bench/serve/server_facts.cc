#include "cli/bench/serve/server_facts.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <set>

#include "absl/strings/str_cat.h"
#include "cli/chat/stream.h"
#include "common/base/status_macros.h"

namespace tandem::cli {
namespace {

using nlohmann::json;

constexpr std::chrono::seconds kPatience{60};
constexpr int32_t kFewWords = 64, kManyWords = 320;

constexpr std::array<const char*, 64> kWords = {
    "the",    "river", "was",   "calm", "and",  "a",     "boat",  "went",  "down",   "to",     "sea",
    "with",   "three", "men",   "who",  "said", "that",  "it",    "would", "rain",   "before", "night",
    "but",    "one",   "of",    "them", "had",  "seen",  "light", "on",    "far",    "side",   "so",
    "they",   "did",   "not",   "turn", "back", "when",  "wind",  "came",  "up",     "from",   "south",
    "every",  "house", "in",    "town", "has",  "its",   "own",   "door",  "number", "street", "some",
    "people", "like",  "bread", "more", "than", "water", "salt",  "hand",  "paper"};

absl::StatusOr<json> Ask(const Url& url, const ServeLoadOptions& options, const std::string& path,
                         const std::string& body) {
  const HttpClient client(url, nullptr, options.api_key);
  TANDEM_ASSIGN_OR_RETURN(const HttpReply reply, body.empty() ? client.Get(path, kPatience)
                                                              : client.Post(path, body, kPatience, nullptr));
  if (reply.status != 200) {
    return absl::UnavailableError(
        absl::StrCat(url.ToString(), path, " answers ", reply.status, ": ", ErrorMessage(reply.body)));
  }
  json parsed = json::parse(reply.body, nullptr, /*allow_exceptions=*/false);
  if (!parsed.is_object()) {
    return absl::UnavailableError(absl::StrCat(url.ToString(), path, " answers with no JSON object"));
  }
  return parsed;
}

int64_t CountAt(const json& object, const char* key) {
  if (!object.is_object()) return 0;
  const auto it = object.find(key);
  return it != object.end() && it->is_number_integer() ? it->get<int64_t>() : 0;
}

// The token ids of all words, each once; empty if the server has no /tokenize of our kind.
std::vector<int32_t> OrdinaryTokens(const Url& url, const ServeLoadOptions& options) {
  std::vector<int32_t> all(kWords.size());
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int32_t>(i);
  const absl::StatusOr<json> reply =
      Ask(url, options, "/tokenize", json{{"content", WordText(all)}, {"add_special", false}}.dump());
  if (!reply.ok() || !reply->contains("tokens") || !(*reply)["tokens"].is_array()) return {};
  std::set<int32_t> ids;
  for (const json& token : (*reply)["tokens"]) {
    if (!token.is_number_integer()) return {};
    ids.insert(token.get<int32_t>());
  }
  return {ids.begin(), ids.end()};
}

absl::StatusOr<int64_t> PromptTokens(const Url& url, const ServeLoadOptions& options,
                                     const ServerFacts& facts, int32_t words) {
  std::vector<int32_t> prompt;
  for (int32_t i = 0; i < words; ++i) prompt.push_back(i % static_cast<int32_t>(kWords.size()));
  TANDEM_ASSIGN_OR_RETURN(const json reply, Ask(url, options, RequestPath(options),
                                                RequestBody(options, facts, prompt, 1, 1, false)));
  const int64_t count = reply.contains("usage") ? CountAt(reply["usage"], "prompt_tokens") : 0;
  if (count <= 0) {
    return absl::UnavailableError(absl::StrCat(url.ToString(), " does not say how long a prompt is (usage)"));
  }
  return count;
}

}  // namespace

int64_t WordCount() { return static_cast<int64_t>(kWords.size()); }

std::string WordText(const std::vector<int32_t>& words) {
  std::string text;
  for (const int32_t word : words) {
    if (!text.empty()) text += ' ';
    text += kWords[static_cast<size_t>(word)];
  }
  return text;
}

const char* RequestPath(const ServeLoadOptions& options) {
  return options.api == "chat" ? "/v1/chat/completions" : "/v1/completions";
}

std::string RequestBody(const ServeLoadOptions& options, const ServerFacts& facts,
                        const std::vector<int32_t>& prompt, int64_t output_tokens, uint64_t seed,
                        bool stream) {
  nlohmann::ordered_json body;
  body["model"] = facts.model;
  if (options.api == "chat") {
    body["messages"] = {{{"role", "user"}, {"content", WordText(prompt)}}};
  } else if (facts.tokens.empty()) {
    body["prompt"] = WordText(prompt);
  } else {
    std::vector<int32_t> ids;
    ids.reserve(prompt.size());
    for (const int32_t unit : prompt) ids.push_back(facts.tokens[static_cast<size_t>(unit)]);
    body["prompt"] = std::move(ids);
  }
  body["max_tokens"] = output_tokens;
  body["temperature"] = options.temperature;
  if (options.temperature > 0) body["seed"] = seed;
  if (options.ignore_eos) body["ignore_eos"] = true;
  if (stream) {
    body["stream"] = true;
    body["stream_options"] = {{"include_usage", true}};
  }
  return body.dump();
}

absl::StatusOr<ServerFacts> AskServer(const Url& url, const ServeLoadOptions& options) {
  ServerFacts facts;
  facts.model = options.served_model;
  TANDEM_ASSIGN_OR_RETURN(const json models, Ask(url, options, "/v1/models", ""));
  const auto data = models.find("data");
  if (data != models.end() && data->is_array() && !data->empty() && data->front().is_object()) {
    const json& first = data->front();
    if (facts.model.empty() && first.contains("id") && first["id"].is_string()) facts.model = first["id"];
    facts.max_context = CountAt(first, "max_model_len");
  }
  if (facts.max_context == 0) {
    const absl::StatusOr<json> props = Ask(url, options, "/props", "");
    if (props.ok() && props->contains("default_generation_settings")) {
      facts.max_context = CountAt((*props)["default_generation_settings"], "n_ctx");
    }
  }
  if (options.prompts == "tokens" && options.api == "chat") {
    return absl::InvalidArgumentError("--prompts tokens: the chat endpoint takes text alone");
  }
  if (options.prompts != "text" && options.api != "chat") {
    facts.tokens = OrdinaryTokens(url, options);
    if (facts.tokens.size() > 1) return facts;
    facts.tokens.clear();
    if (options.prompts == "tokens") {
      return absl::InvalidArgumentError(
          absl::StrCat("--prompts tokens: ", url.ToString(), " has no /tokenize that tells token ids"));
    }
  }
  TANDEM_ASSIGN_OR_RETURN(const int64_t few, PromptTokens(url, options, facts, kFewWords));
  TANDEM_ASSIGN_OR_RETURN(const int64_t many, PromptTokens(url, options, facts, kManyWords));
  facts.tokens_per_word = static_cast<double>(many - few) / (kManyWords - kFewWords);
  if (facts.tokens_per_word <= 0) {
    return absl::UnavailableError(absl::StrCat(url.ToString(), " counts ", few, " and ", many, " tokens for ",
                                               kFewWords, " and ", kManyWords, " words"));
  }
  facts.overhead_tokens = std::max(0.0, static_cast<double>(few) - facts.tokens_per_word * kFewWords);
  return facts;
}

}  // namespace tandem::cli
