// HTTP/1.1 calls by the thousand on one thread: keep-alive connections that are used again, answers handed on
// piece by piece as they arrive. Internal to the load generator; cli/util/http_client.h is the client for all
// else.
#pragma once

#include <utility>  // Asio 1.74's awaitable.hpp uses std::exchange without including it

#include <boost/asio/io_context.hpp>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cli/util/http_client.h"

namespace tandem::cli {

enum class CallEnd { kWhole, kConnect, kTimeout, kBroken, kCancelled };

// Calls come from the thread that runs the io_context.
class CallListener {
 public:
  using Clock = std::chrono::steady_clock;
  virtual ~CallListener() = default;
  virtual void OnHead(int status, std::string_view content_type) = 0;
  virtual void OnBody(std::string_view bytes, Clock::time_point now) = 0;
  // Once, last. `message` says what went wrong.
  virtual void OnEnd(CallEnd end, const std::string& message) = 0;
};

// All methods: the thread of the io_context. A call that is under way keeps what it needs alive.
class LoadClient {
 public:
  struct Options {
    Url url;
    std::string api_key;
    std::chrono::milliseconds timeout{600000};  // without a byte
  };
  // Unavailable: the host's name has no address.
  static absl::StatusOr<std::unique_ptr<LoadClient>> Create(boost::asio::io_context& io,
                                                            const Options& options);
  ~LoadClient();

  // An empty `json`: GET.
  void Call(const std::string& path, const std::string& json, std::shared_ptr<CallListener> listener);
  // Ends every call under way.
  void CancelAll();
  int64_t connections_opened() const;

  struct State;
  class Connection;

 private:
  explicit LoadClient(std::shared_ptr<State> state);
  std::shared_ptr<State> state_;
};

}  // namespace tandem::cli
