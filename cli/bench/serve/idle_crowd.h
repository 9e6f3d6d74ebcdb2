// Many keep-alive connections that do nothing, beside a load: what they cost the server is what is asked.
#pragma once

#include <utility>  // Asio 1.74's awaitable.hpp uses std::exchange without including it

#include <boost/asio/io_context.hpp>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "cli/util/http_client.h"

namespace tandem::cli {

// All methods: the thread of the io_context.
class IdleCrowd {
 public:
  struct Counts {
    int64_t wanted = 0;
    int64_t open = 0;      // held now
    int64_t refused = 0;   // could not be opened, or /health did not answer 200
    int64_t dropped = 0;   // closed by the server while they were held
    int64_t requests = 0;  // to /health, answered
  };

  // Opens them, some at a time; each asks /health at once and then every `every` (zero: never again).
  // `on_open` runs when each of them has been opened or refused.
  static absl::StatusOr<std::unique_ptr<IdleCrowd>> Start(boost::asio::io_context& io, const Url& url,
                                                          int64_t count, std::chrono::milliseconds every,
                                                          std::function<void()> on_open);
  ~IdleCrowd();
  Counts counts() const;
  // Closes them all.
  void Stop();

  struct State;

 private:
  explicit IdleCrowd(std::shared_ptr<State> state);
  std::shared_ptr<State> state_;
};

}  // namespace tandem::cli
