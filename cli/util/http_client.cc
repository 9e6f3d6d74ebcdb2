#include "cli/util/http_client.h"

#include <boost/asio/connect.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <cctype>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"

namespace tandem::cli {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using boost::system::error_code;
using std::chrono::milliseconds;

constexpr milliseconds kSlice{100};
constexpr size_t kLargestReply = 64 << 20;

// Runs asynchronous operations one at a time to their end, looking at the stop flag in between.
class Runner {
 public:
  Runner(const Url& url, const std::atomic<bool>* stop) : url_(url), stop_(stop), stream_(io_) {}

  beast::tcp_stream& stream() { return stream_; }

  // `start` begins one operation with the handler it is given.
  template <typename Start>
  absl::Status Run(milliseconds patience, const Start& start) {
    std::optional<error_code> result;
    stream_.expires_after(patience);
    start([&result](const error_code& error, auto&&...) { result = error; });
    io_.restart();
    bool cancelled = false;
    while (!result) {
      io_.run_for(kSlice);
      if (io_.stopped() && !result) io_.restart();
      if (!cancelled && stop_ != nullptr && stop_->load()) {
        cancelled = true;
        stream_.cancel();
      }
    }
    if (cancelled) return absl::CancelledError("interrupted");
    if (!*result) return absl::OkStatus();
    if (*result == beast::error::timeout) {
      return absl::DeadlineExceededError(
          absl::StrCat(url_.ToString(), " did not answer within ", patience.count() / 1000.0, " s"));
    }
    return absl::UnavailableError(absl::StrCat(url_.ToString(), ": ", What(*result)));
  }

  // From now on an end of the connection is one in the middle of an answer.
  void AnswerHasBegun() { answering_ = true; }

 private:
  std::string What(const error_code& error) const {
    const bool lost = error == asio::error::connection_reset || error == asio::error::eof ||
                      error == http::error::end_of_stream;
    if (error == http::error::partial_message || (lost && answering_)) {
      return "the connection was lost in the middle of the answer";
    }
    return error == http::error::end_of_stream ? "the connection was closed without an answer"
                                               : error.message();
  }

  const Url& url_;
  const std::atomic<bool>* stop_;
  bool answering_ = false;
  asio::io_context io_;
  beast::tcp_stream stream_;
};

}  // namespace

std::string Url::ToString() const {
  const bool v6 = host.find(':') != std::string::npos;
  return absl::StrCat("http://", v6 ? "[" : "", host, v6 ? "]" : "", ":", port, path);
}

absl::StatusOr<Url> ParseUrl(const std::string& text) {
  const auto error = [&](const char* what) {
    return absl::InvalidArgumentError(absl::StrCat("\"", text, "\" is not an address of a server: ", what));
  };
  std::string rest = text;
  if (const size_t scheme = rest.find("://"); scheme != std::string::npos) {
    if (rest.substr(0, scheme) != "http") return error("only http:// is spoken");
    rest.erase(0, scheme + 3);
  }
  for (const char c : rest) {
    if (static_cast<unsigned char>(c) <= 0x20 || c == 0x7F)
      return error("it has blanks or control characters");
  }
  Url url;
  const size_t slash = rest.find('/');
  if (slash != std::string::npos) url.path = rest.substr(slash);
  while (!url.path.empty() && url.path.back() == '/') url.path.pop_back();
  rest.resize(std::min(slash, rest.size()));
  size_t colon = rest.rfind(':');
  if (!rest.empty() && rest.front() == '[') {
    const size_t close = rest.find(']');
    if (close == std::string::npos) return error("the bracket does not close");
    url.host = rest.substr(1, close - 1);
    if (close + 1 < rest.size() && rest[close + 1] != ':') return error("expected :PORT after the bracket");
    colon = close + 1 < rest.size() ? close + 1 : std::string::npos;
  } else {
    url.host = rest.substr(0, colon);
    if (url.host.find(':') != std::string::npos) return error("IPv6 addresses stand in brackets");
  }
  url.port = colon == std::string::npos ? "80" : rest.substr(colon + 1);
  if (url.host.empty()) return error("the host is missing");
  int port = 0;
  for (const char c : url.port) {
    if (std::isdigit(static_cast<unsigned char>(c)) == 0 || port > 65535)
      return error("the port is not a number");
    port = port * 10 + (c - '0');
  }
  if (port < 1 || port > 65535) return error("the port must be 1 to 65535");
  return url;
}

absl::StatusOr<Url> ParseApiUrl(const std::string& text) {
  constexpr std::string_view kVersion = "/v1";
  TANDEM_ASSIGN_OR_RETURN(Url url, ParseUrl(text));
  if (url.path.ends_with(kVersion)) url.path.resize(url.path.size() - kVersion.size());
  while (!url.path.empty() && url.path.back() == '/') url.path.pop_back();
  return url;
}

HttpClient::HttpClient(Url url, const std::atomic<bool>* stop, std::string api_key)
    : url_(std::move(url)), stop_(stop), api_key_(std::move(api_key)) {}

absl::StatusOr<HttpReply> HttpClient::Get(const std::string& path, milliseconds patience) const {
  return Call(false, path, "", patience, nullptr);
}

absl::StatusOr<HttpReply> HttpClient::Post(const std::string& path, const std::string& json,
                                           milliseconds patience,
                                           const std::function<void(std::string_view)>& on_data) const {
  return Call(true, path, json, patience, on_data);
}

absl::StatusOr<HttpReply> HttpClient::Call(bool post, const std::string& path, const std::string& json,
                                           milliseconds patience,
                                           const std::function<void(std::string_view)>& on_data) const {
  error_code error;
  asio::io_context resolver_io;
  asio::ip::tcp::resolver resolver(resolver_io);
  const auto addresses = resolver.resolve(url_.host, url_.port, error);
  if (error) return absl::UnavailableError(absl::StrCat(url_.ToString(), ": ", error.message()));

  Runner runner(url_, stop_);
  beast::tcp_stream& stream = runner.stream();
  TANDEM_RETURN_IF_ERROR(
      runner.Run(patience, [&](auto done) { stream.async_connect(addresses, std::move(done)); }));

  http::request<http::string_body> request(post ? http::verb::post : http::verb::get, url_.path + path, 11);
  request.set(http::field::host, url_.host + ":" + url_.port);
  request.set(http::field::user_agent, "tandem");
  request.set(http::field::connection, "close");
  if (!api_key_.empty()) request.set(http::field::authorization, "Bearer " + api_key_);
  if (post) {
    request.set(http::field::content_type, "application/json");
    request.body() = json;
  }
  request.prepare_payload();
  TANDEM_RETURN_IF_ERROR(
      runner.Run(patience, [&](auto done) { http::async_write(stream, request, std::move(done)); }));

  beast::flat_buffer buffer;
  http::response_parser<http::string_body> parser;
  // Not "none": Beast 1.74 takes that for zero where an answer has a Content-Length.
  parser.body_limit(on_data ? std::numeric_limits<uint64_t>::max() : kLargestReply);
  TANDEM_RETURN_IF_ERROR(runner.Run(
      patience, [&](auto done) { http::async_read_header(stream, buffer, parser, std::move(done)); }));
  runner.AnswerHasBegun();
  HttpReply reply;
  reply.status = static_cast<int>(parser.get().result_int());
  reply.content_type = std::string(parser.get()[http::field::content_type]);
  const bool streamed = on_data && reply.status == 200;
  while (!parser.is_done()) {
    TANDEM_RETURN_IF_ERROR(runner.Run(
        patience, [&](auto done) { http::async_read_some(stream, buffer, parser, std::move(done)); }));
    std::string& body = parser.get().body();
    if (streamed && !body.empty()) {
      on_data(body);
      body.clear();
    }
    if (body.size() > kLargestReply) return absl::ResourceExhaustedError("the server's answer is too long");
  }
  if (streamed && !parser.get().body().empty()) on_data(parser.get().body());
  if (!streamed) reply.body = parser.get().body();
  return reply;
}

}  // namespace tandem::cli
