#include "cli/bench/serve/streamed_answer.h"

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "cli/chat/stream.h"
#include "cli/util/format.h"

namespace tandem::cli {
namespace {

using nlohmann::json;

constexpr size_t kShown = 120;

std::string Shown(const std::string& text) { return Printable(text.substr(0, kShown)); }

// The text at `key`, empty if it is absent or null; nullopt if it is something else.
std::optional<std::string> TextAt(const json& object, const char* key) {
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) return std::string();
  if (!it->is_string()) return std::nullopt;
  return it->get<std::string>();
}

// A count at `key`; nullopt if there is none.
std::optional<int64_t> CountAt(const json& object, const char* key) {
  const auto it = object.find(key);
  if (it == object.end() || !it->is_number_integer() || *it < 0) return std::nullopt;
  return it->get<int64_t>();
}

}  // namespace

StreamedAnswer::StreamedAnswer(const ExpectedAnswer& expected)
    : expected_(expected), reader_([this](const std::string& data) { OnEvent(data); }) {}

void StreamedAnswer::Fail(std::string kind, std::string detail) {
  if (!fault_.has_value()) fault_ = Fault{std::move(kind), std::move(detail)};
}

void StreamedAnswer::Feed(std::string_view piece, Clock::time_point now) {
  now_ = now;
  reader_.Feed(piece);
}

void StreamedAnswer::Moment() {
  if (last_.has_value()) gaps_.push_back(std::chrono::duration<float>(now_ - *last_).count());
  if (!first_.has_value()) first_ = now_;
  last_ = now_;
}

void StreamedAnswer::OnEvent(const std::string& data) {
  if (fault_.has_value()) return;
  if (done_) return Fail("malformed stream", "an event after [DONE]: " + Shown(data));
  if (data == "[DONE]") {
    done_ = true;
    return;
  }
  const json event = json::parse(data, nullptr, /*allow_exceptions=*/false);
  if (!event.is_object()) return Fail("malformed stream", "an event is no JSON object: " + Shown(data));
  if (event.contains("error")) return Fail("error event", ErrorMessage(data));
  const std::optional<std::string> id = TextAt(event, "id");
  if (!id.has_value() || (!id_.empty() && *id != id_)) {
    return Fail("malformed stream", "an event has another id than those before it: " + Shown(data));
  }
  id_ = *id;
  if (const auto usage = event.find("usage"); usage != event.end() && usage->is_object()) {
    const std::optional<int64_t> prompt = CountAt(*usage, "prompt_tokens");
    const std::optional<int64_t> completion = CountAt(*usage, "completion_tokens");
    if (!prompt || !completion) return Fail("wrong usage", "it lacks counts: " + Shown(usage->dump()));
    const std::optional<int64_t> total = CountAt(*usage, "total_tokens");
    if (total && *total != *prompt + *completion) {
      return Fail("wrong usage", "the total is not the sum: " + Shown(usage->dump()));
    }
    usage_ = true;
    prompt_tokens_ = *prompt;
    completion_tokens_ = *completion;
    const auto details = usage->find("prompt_tokens_details");
    if (details != usage->end() && details->is_object()) {
      cached_tokens_ = CountAt(*details, "cached_tokens").value_or(0);
    }
  }
  const auto choices = event.find("choices");
  if (choices == event.end() || !choices->is_array() || choices->size() > 1) {
    return Fail("malformed stream", "an event without its \"choices\": " + Shown(data));
  }
  if (choices->empty()) return;
  const json& choice = choices->front();
  if (!choice.is_object()) return Fail("malformed stream", "a choice is no object: " + Shown(data));
  std::string text;
  const auto take = [&](const json& from, const char* key) {
    const std::optional<std::string> piece = TextAt(from, key);
    if (!piece.has_value()) return Fail("malformed stream", "text that is none: " + Shown(data));
    text += *piece;
  };
  if (expected_.chat) {
    const auto delta = choice.find("delta");
    if (delta == choice.end() || !delta->is_object()) {
      return Fail("malformed stream", "a choice without \"delta\": " + Shown(data));
    }
    take(*delta, "reasoning_content");
    take(*delta, "content");
  } else {
    take(choice, "text");
  }
  if (fault_.has_value()) return;
  if (!text.empty()) {
    if (!finish_.empty()) return Fail("malformed stream", "text after finish_reason: " + Shown(data));
    ++pieces_;
    text_ += text;
    Moment();
  }
  const std::optional<std::string> reason = TextAt(choice, "finish_reason");
  if (!reason.has_value()) return Fail("malformed stream", "finish_reason is no text: " + Shown(data));
  if (!reason->empty()) {
    if (!finish_.empty()) return Fail("malformed stream", "finish_reason comes twice");
    finish_ = *reason;
    if (!first_.has_value()) Moment();
  }
}

std::optional<Fault> StreamedAnswer::Finish(bool whole) {
  if (fault_.has_value()) return fault_;
  if (!whole) Fail("cut off", absl::StrCat("the connection ended after ", pieces_, " pieces of text"));
  if (finish_.empty()) Fail("wrong end", "the stream ended without finish_reason");
  if (!done_) Fail("wrong end", "the stream ended without [DONE]");
  if (finish_ != "stop" && finish_ != "length") Fail("wrong end", "finish_reason is " + Shown(finish_));
  if (!fault_.has_value()) CheckCounts();
  return fault_;
}

void StreamedAnswer::CheckCounts() {
  if (!usage_) return Fail("wrong usage", "none was sent");
  const int64_t sent = expected_.prompt_tokens;
  if (sent > 0 && prompt_tokens_ != sent && prompt_tokens_ != sent + 1) {
    return Fail("wrong usage",
                absl::StrCat(sent, " prompt tokens were sent and ", prompt_tokens_, " counted"));
  }
  if (cached_tokens_ > prompt_tokens_) {
    return Fail("wrong usage", absl::StrCat(cached_tokens_, " of ", prompt_tokens_, " tokens were cached"));
  }
  if (completion_tokens_ > expected_.max_tokens) {
    return Fail("wrong usage", absl::StrCat(completion_tokens_, " tokens came where ", expected_.max_tokens,
                                            " were asked for"));
  }
  // One more than tokens: what was held back of the last one (half a character) may come apart.
  if (pieces_ > completion_tokens_ + 1) {
    return Fail("wrong usage", absl::StrCat(pieces_, " pieces of text came and ", completion_tokens_,
                                            " tokens were counted"));
  }
  if ((finish_ == "length" || expected_.exact) && completion_tokens_ != expected_.max_tokens) {
    return Fail("wrong end", absl::StrCat("finish_reason is ", finish_, " after ", completion_tokens_, " of ",
                                          expected_.max_tokens, " tokens"));
  }
}

}  // namespace tandem::cli
