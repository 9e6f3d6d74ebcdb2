#include "cli/util/sse.h"

namespace tandem::cli {

void SseReader::Feed(std::string_view piece) {
  for (size_t begin = 0; begin < piece.size();) {
    const size_t end = piece.find('\n', begin);
    if (end == std::string_view::npos) {
      line_.append(piece.substr(begin));
      return;
    }
    line_.append(piece.substr(begin, end - begin));
    begin = end + 1;
    if (!line_.empty() && line_.back() == '\r') line_.pop_back();
    TakeLine(line_);
    line_.clear();
  }
}

void SseReader::TakeLine(std::string_view line) {
  if (line.empty()) {
    if (has_data_) on_event_(data_);
    data_.clear();
    has_data_ = false;
    return;
  }
  const size_t colon = line.find(':');
  if (line.substr(0, colon) != "data") return;  // comments (nothing before the colon) and other fields
  std::string_view value = colon == std::string_view::npos ? std::string_view() : line.substr(colon + 1);
  if (!value.empty() && value.front() == ' ') value.remove_prefix(1);
  if (has_data_) data_ += '\n';
  data_.append(value);
  has_data_ = true;
}

}  // namespace tandem::cli
