// Finds stop strings in a stream of text. Text that may be the beginning of one is held back, so that no part
// of a stop string is ever given out.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace tandem::gateway {

// One stream each; not thread-safe.
class StopMatcher {
 public:
  // Empty strings are ignored.
  explicit StopMatcher(std::vector<std::string> stops);

  // The text that is safe to give out. After a stop string was found: the text before it, and stopped()
  // holds; nothing comes out any more. Of two stop strings the one that begins first ends the text.
  std::string Push(std::string_view text);
  // What was held back, at the end of a stream that was not stopped.
  std::string Flush();

  bool stopped() const { return stopped_; }
  size_t held_bytes() const { return held_.size(); }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace tandem::gateway
