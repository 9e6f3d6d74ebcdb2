// The REST interface as a well-behaved client uses it, with answers in a form that tests can compare.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/util/http_client.h"

namespace tandem::integration {

using Json = nlohmann::ordered_json;

struct Reply {
  int status = 0;  // 0: no answer
  Json body;       // discarded if it is no JSON
  std::string text;

  std::string error_code() const;
  std::string error_message() const;
};

// Of a chat or a completion, streamed or not.
struct Answer {
  int status = 0;
  std::string reasoning, content;  // content: also a completion's text
  std::string finish;
  Json usage;         // null if none came
  Json logprobs;      // array of {"token", "logprob", ...}, of a chat alone: reasoning, then content
  Json error;         // null if all went well
  int events = 0;     // of a stream, [DONE] left out
  bool done = false;  // [DONE] came, last

  bool ok() const { return status == 200 && error.is_null() && !finish.empty(); }
  std::string ToString() const;
};

// One connection a call; thread-safe. Called with the number of events so far, while the stream stands still
// on our side; false closes the connection.
using OnEvent = std::function<bool(int events)>;

class RestClient {
 public:
  explicit RestClient(int port);

  Reply Get(const std::string& path) const;
  Reply Post(const std::string& path, const Json& body) const;
  // `request` goes to /v1/chat/completions if it has messages, else to /v1/completions.
  Answer Ask(const Json& request) const;
  Answer Stream(Json request, const OnEvent& on_event = nullptr) const;
  // Sum of a metric's samples at /metrics whose labels contain `label`; -1 if there is none.
  double Metric(const std::string& name, const std::string& label = "") const;

 private:
  cli::Url url_;
};

// {"messages": [{"role": "user", "content": question}], "temperature": 0}
Json Question(const std::string& question);
// A long greedy answer: goes on past its end until there are `tokens` tokens.
Json LongQuestion(int tokens);

}  // namespace tandem::integration
