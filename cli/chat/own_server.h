// A `tandem serve` that lives as long as a chat.
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace tandem::cli {

class OwnServer {
 public:
  // Starts it on a free port and waits until it answers. `model` empty: the demo model. Errors carry the last
  // lines that it wrote. Cancelled when `stop` becomes true.
  static absl::StatusOr<std::unique_ptr<OwnServer>> Start(const std::string& model,
                                                          const std::atomic<bool>& stop);
  ~OwnServer();  // stops it and waits

  const std::string& url() const;

 private:
  struct Impl;
  explicit OwnServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tandem::cli
