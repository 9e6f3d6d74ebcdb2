#include "tests/integration/rest_client.h"

#include <atomic>
#include <cstdlib>
#include <sstream>

#include "cli/util/sse.h"
#include "common/testing/process.h"

namespace tandem::integration {
namespace {

using testing::kPatience;

std::string ErrorField(const Json& body, const char* field) {
  if (!body.is_object() || !body.contains("error") || !body["error"].is_object()) return "";
  const Json& value = body["error"][field];
  return value.is_string() ? value.get<std::string>() : "";
}

void AppendText(const Json& from, const char* field, std::string* to) {
  if (from.is_object() && from.contains(field) && from[field].is_string())
    *to += from[field].get<std::string>();
}

void TakeChoice(const Json& choice, const char* part, Answer* answer) {
  if (choice.contains(part)) {
    AppendText(choice[part], "reasoning_content", &answer->reasoning);
    AppendText(choice[part], "content", &answer->content);
  }
  AppendText(choice, "text", &answer->content);
  AppendText(choice, "finish_reason", &answer->finish);
  if (choice.contains("logprobs") && choice["logprobs"].is_object()) {
    for (const char* list : {"reasoning_content", "content"}) {
      if (!choice["logprobs"].contains(list)) continue;
      for (const Json& token : choice["logprobs"][list]) answer->logprobs.push_back(token);
    }
  }
}

void TakeEvent(const std::string& data, Answer* answer) {
  if (data == "[DONE]") {
    answer->done = true;
    return;
  }
  answer->done = false;  // nothing may follow it
  ++answer->events;
  const Json event = Json::parse(data, nullptr, /*allow_exceptions=*/false);
  if (event.is_discarded()) {
    answer->error = "no JSON: " + data;
    return;
  }
  if (event.contains("error")) answer->error = event["error"];
  if (event.contains("usage") && !event["usage"].is_null()) answer->usage = event["usage"];
  if (!event.contains("choices")) return;
  for (const Json& choice : event["choices"]) TakeChoice(choice, "delta", answer);
}

std::string PathFor(const Json& request) {
  return request.contains("messages") ? "/v1/chat/completions" : "/v1/completions";
}

}  // namespace

std::string Reply::error_code() const { return ErrorField(body, "code"); }
std::string Reply::error_message() const { return ErrorField(body, "message"); }

std::string Answer::ToString() const {
  std::ostringstream out;
  out << "status " << status << ", finish \"" << finish << "\", " << events << " events, done " << done
      << ", error " << error << ", reasoning \"" << reasoning << "\", content \"" << content << "\"";
  return out.str();
}

RestClient::RestClient(int port) {
  url_.host = "127.0.0.1";
  url_.port = std::to_string(port);
}

Reply RestClient::Get(const std::string& path) const {
  Reply out;
  const auto reply = cli::HttpClient(url_).Get(path, kPatience);
  if (!reply.ok()) {
    out.text = std::string(reply.status().message());
    return out;
  }
  out.status = reply->status;
  out.text = reply->body;
  out.body = Json::parse(out.text, nullptr, /*allow_exceptions=*/false);
  return out;
}

Reply RestClient::Post(const std::string& path, const Json& body) const {
  Reply out;
  const auto reply = cli::HttpClient(url_).Post(path, body.dump(), kPatience, nullptr);
  if (!reply.ok()) {
    out.text = std::string(reply.status().message());
    return out;
  }
  out.status = reply->status;
  out.text = reply->body;
  out.body = Json::parse(out.text, nullptr, /*allow_exceptions=*/false);
  return out;
}

Answer RestClient::Ask(const Json& request) const {
  const Reply reply = Post(PathFor(request), request);
  Answer answer;
  answer.status = reply.status;
  answer.logprobs = Json::array();
  if (reply.status != 200 || !reply.body.is_object() || !reply.body.contains("choices")) {
    answer.error = reply.text;
    return answer;
  }
  answer.usage = reply.body["usage"];
  for (const Json& choice : reply.body["choices"]) TakeChoice(choice, "message", &answer);
  return answer;
}

Answer RestClient::Stream(Json request, const OnEvent& on_event) const {
  request["stream"] = true;
  if (!request.contains("stream_options")) request["stream_options"] = {{"include_usage", true}};
  Answer answer;
  answer.logprobs = Json::array();
  std::atomic<bool> stop{false};
  cli::SseReader reader([&](const std::string& data) {
    TakeEvent(data, &answer);
    if (on_event && !stop && !on_event(answer.events)) stop = true;
  });
  const auto reply = cli::HttpClient(url_, &stop)
                         .Post(PathFor(request), request.dump(), kPatience,
                               [&reader](std::string_view piece) { reader.Feed(piece); });
  if (!reply.ok()) {
    answer.error = std::string(reply.status().ToString());
    return answer;
  }
  answer.status = reply->status;
  if (reply->status != 200) answer.error = reply->body;
  return answer;
}

double RestClient::Metric(const std::string& name, const std::string& label) const {
  std::istringstream lines(Get("/metrics").text);
  double sum = 0;
  bool found = false;
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind(name, 0) != 0 || line.size() <= name.size()) continue;
    if (line[name.size()] != ' ' && line[name.size()] != '{') continue;
    if (line.find(label) == std::string::npos) continue;
    sum += std::atof(line.c_str() + line.rfind(' ') + 1);
    found = true;
  }
  return found ? sum : -1;
}

Json Question(const std::string& question) {
  return {{"messages", {{{"role", "user"}, {"content", question}}}}, {"temperature", 0}};
}

Json LongQuestion(int tokens) {
  Json request = Question("What is 4321 + 5678?");
  request["ignore_eos"] = true;
  request["max_tokens"] = tokens;
  return request;
}

}  // namespace tandem::integration
