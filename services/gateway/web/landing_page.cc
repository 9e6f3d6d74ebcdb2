#include "services/gateway/web/landing_page.h"

namespace tandem::gateway {
namespace {

std::string Escape(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '&':
        out += "&amp;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

constexpr std::string_view kEndpoints[][2] = {
    {"POST /v1/chat/completions", "chat, streamed or not (OpenAI's shape)"},
    {"POST /v1/completions", "text completion"},
    {"GET /v1/models", "the model that is served"},
    {"POST /tokenize", "text to tokens"},
    {"POST /detokenize", "tokens to text"},
    {"POST /apply-template", "messages to prompt"},
    {"GET /health", "is the gateway alive?"},
    {"GET /ready", "are requests accepted?"},
    {"GET /metrics", "for Prometheus"},
};

}  // namespace

std::string LandingPage(std::string_view model, std::string_view state) {
  std::string page =
      "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>Tandem</title>\n"
      "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:44rem;margin:3rem auto;padding:0 1rem}"
      "td{padding:.15rem 1rem .15rem 0}code{font-size:.95em}</style>\n<h1>Tandem</h1>\n<p>Model: <code>";
  page += model.empty() ? "not known yet" : Escape(model);
  page += "</code><br>State: " + Escape(state) + "</p>\n<table>\n";
  for (const auto& [endpoint, what] : kEndpoints) {
    page.append("<tr><td><code>").append(endpoint).append("</code><td>").append(what).append("\n");
  }
  page += "</table>\n</html>\n";
  return page;
}

}  // namespace tandem::gateway
