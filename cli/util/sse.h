// Server-sent events (WHATWG HTML, section "Server-sent events"), as far as chat streams use them: the data
// of each event. Not thread-safe.
#pragma once

#include <functional>
#include <string>
#include <string_view>

namespace tandem::cli {

class SseReader {
 public:
  explicit SseReader(std::function<void(const std::string& data)> on_event)
      : on_event_(std::move(on_event)) {}

  // Pieces may be cut anywhere. Lines end with LF or CR LF.
  void Feed(std::string_view piece);

 private:
  void TakeLine(std::string_view line);

  std::function<void(const std::string&)> on_event_;
  std::string line_;
  std::string data_;
  bool has_data_ = false;
};

}  // namespace tandem::cli
