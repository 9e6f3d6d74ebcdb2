#include "services/expert_cpu/moe/work_units.h"

#include <algorithm>

namespace tandem::expert {
namespace {

// What is left is cut as if each worker took so many more units.
constexpr int64_t kUnitsToCome = 2;

}  // namespace

void WorkUnits::Cut(int64_t parts, int64_t rows, int64_t workers, const Size& size) {
  units_.clear();
  counts_.assign(static_cast<size_t>(parts), 0);
  int64_t left = parts * rows;
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t row = 0; row < rows;) {
      const int64_t share = left / (workers * kUnitsToCome) / size.least * size.least;
      const int64_t unit =
          std::min(rows - row, std::max(size.least, std::min(share, std::max(size.least, size.most))));
      units_.push_back({part, row, row + unit});
      ++counts_[static_cast<size_t>(part)];
      row += unit;
      left -= unit;
    }
  }
}

}  // namespace tandem::expert
