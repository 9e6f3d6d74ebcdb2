// "Did you mean": the word of a list that is closest to a misspelt one.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace tandem::cli {

// Insertions, deletions, substitutions and swaps of neighbours that turn a into b.
int EditDistance(std::string_view a, std::string_view b);

// The candidate with the smallest distance, case and leading dashes not counted; empty if all are further
// away than a third of the word (at least 2 edits are forgiven from 4 letters on).
std::string Nearest(std::string_view word, const std::vector<std::string>& candidates);

}  // namespace tandem::cli
