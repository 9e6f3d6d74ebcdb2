// How products with a few tokens read the weights. All ways give the same bits; which is fastest depends on
// the processor's caches and prefetchers, and between them lies up to half of the memory's bandwidth.
#pragma once

#include <array>
#include <string_view>

namespace tandem::kernels {

enum class ReadingWay {
  kPanels,      // 16 rows side by side, asked for into the second cache while the rows before are worked on
  kPanelsRows,  // long rows so; short ones with one or two tokens row by row, 1 KB ahead into the second
                // cache
  kFollowed,    // long rows as panels that the processor's own prefetchers follow; short ones as above, 3 KB
  kRows,        // with one or two tokens row by row, 3 KB ahead into the second cache; else as kPanels
  kRowsTwice,   // likewise, 12 KB ahead into the first cache, each line twice; panels, too
};
inline constexpr std::array kReadingWays = {ReadingWay::kPanels, ReadingWay::kPanelsRows,
                                            ReadingWay::kFollowed, ReadingWay::kRows, ReadingWay::kRowsTwice};

std::string_view ReadingWayName(ReadingWay way);  // "panels", "panels-rows", "followed", "rows", "rows-twice"

// What was measured to be fastest on processors like this one.
ReadingWay DefaultReadingWay();

// What products use: the default until another is set. Thread-safe; products under way may go either.
ReadingWay ActiveReadingWay();
void SetReadingWay(ReadingWay way);

}  // namespace tandem::kernels
