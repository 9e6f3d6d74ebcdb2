#include "cli/util/nearest.h"

#include <algorithm>
#include <cctype>
#include <climits>

namespace tandem::cli {
namespace {

std::string Folded(std::string_view word) {
  while (!word.empty() && word.front() == '-') word.remove_prefix(1);
  std::string out(word);
  for (char& c : out) c = c == '_' ? '-' : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return out;
}

}  // namespace

int EditDistance(std::string_view a, std::string_view b) {
  std::vector<std::vector<int>> d(a.size() + 1, std::vector<int>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i) d[i][0] = static_cast<int>(i);
  for (size_t j = 0; j <= b.size(); ++j) d[0][j] = static_cast<int>(j);
  for (size_t i = 1; i <= a.size(); ++i) {
    for (size_t j = 1; j <= b.size(); ++j) {
      const int substituted = d[i - 1][j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1);
      d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, substituted});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
      }
    }
  }
  return d[a.size()][b.size()];
}

std::string Nearest(std::string_view word, const std::vector<std::string>& candidates) {
  // Words come from the command line; longer ones than this are no misspelling of ours.
  constexpr size_t kLongest = 64;
  const std::string wanted = Folded(word);
  if (wanted.empty() || wanted.size() > kLongest) return "";
  const int length = static_cast<int>(wanted.size());
  const int forgiven = length < 4 ? 1 : std::max(2, length / 3);
  std::string best;
  int best_distance = INT_MAX;
  for (const std::string& candidate : candidates) {
    const std::string folded = Folded(candidate);
    int distance = EditDistance(wanted, folded);
    // A beginning that was not finished ("--max-batch") is as good as one edit.
    if (length >= 3 && folded.size() > wanted.size() && folded.compare(0, wanted.size(), wanted) == 0) {
      distance = std::min(distance, 1);
    }
    if (distance <= forgiven && distance < best_distance) {
      best = candidate;
      best_distance = distance;
    }
  }
  return best;
}

}  // namespace tandem::cli
