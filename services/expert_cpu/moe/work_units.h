// Rows of several matrices, cut into units of work: large ones first, since memory serves long runs of
// addresses best, and ever smaller ones towards the end, so that all workers end together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tandem::expert {

// Reusable: Cut keeps the memory. Not thread-safe.
class WorkUnits {
 public:
  struct Unit {
    int64_t part = 0;   // which matrix
    int64_t begin = 0;  // rows [begin, end)
    int64_t end = 0;
  };
  // Of a unit, in rows; `least` is what the kernels want at once.
  struct Size {
    int64_t least = 1;
    int64_t most = 1;
  };

  // `parts` matrices of `rows` rows, one after the other. Units have whole multiples of size.least rows, but
  // for the last of a matrix.
  void Cut(int64_t parts, int64_t rows, int64_t workers, const Size& size);

  int64_t count() const { return static_cast<int64_t>(units_.size()); }
  const Unit& operator[](int64_t unit) const { return units_[static_cast<size_t>(unit)]; }
  int64_t count_of(int64_t part) const { return counts_[static_cast<size_t>(part)]; }

 private:
  std::vector<Unit> units_;
  std::vector<int64_t> counts_;  // by part
};

}  // namespace tandem::expert
