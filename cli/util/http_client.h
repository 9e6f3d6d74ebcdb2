// A small HTTP/1.1 client for our own server: blocking calls with deadlines and a way to stop them from a
// signal handler. Plain HTTP only. A client belongs to one thread.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tandem::cli {

struct Url {
  std::string host;  // without brackets
  std::string port;
  std::string path;  // prefix without a slash at its end; often empty

  std::string ToString() const;
};

// "http://host[:port][/path]"; the scheme may be left out. InvalidArgument says what is wrong with it (https
// is not spoken).
absl::StatusOr<Url> ParseUrl(const std::string& text);

// The same without the "/v1" at its end that other programs' base addresses have: paths begin with it here.
absl::StatusOr<Url> ParseApiUrl(const std::string& text);

struct HttpReply {
  int status = 0;
  std::string content_type;
  std::string body;
};

class HttpClient {
 public:
  // `stop`, if not null, is looked at ten times a second; when it is true, calls end with Cancelled.
  // `api_key`, if not empty, is sent as a bearer token.
  explicit HttpClient(Url url, const std::atomic<bool>* stop = nullptr, std::string api_key = "");

  // Unavailable: nobody answers at the address, or the connection was lost. DeadlineExceeded: `patience`
  // passed without a byte.
  absl::StatusOr<HttpReply> Get(const std::string& path, std::chrono::milliseconds patience) const;

  // Pieces of a 200 answer's body go to `on_data` as they come, and `body` stays empty; other answers are
  // returned whole, as Get does.
  absl::StatusOr<HttpReply> Post(const std::string& path, const std::string& json,
                                 std::chrono::milliseconds patience,
                                 const std::function<void(std::string_view)>& on_data) const;

 private:
  absl::StatusOr<HttpReply> Call(bool post, const std::string& path, const std::string& json,
                                 std::chrono::milliseconds patience,
                                 const std::function<void(std::string_view)>& on_data) const;
  Url url_;
  const std::atomic<bool>* stop_;
  std::string api_key_;
};

}  // namespace tandem::cli
