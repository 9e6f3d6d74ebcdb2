// How products with a few tokens read the weights. All ways give the same bits; which is fastest depends on
// the processor's caches and prefetchers, and between them lies up to half of the memory's bandwidth.
#pragma once

#include <array>
#include <string_view>

namespace tandem::kernels {

// Row by row, with one or two tokens, weights are asked for into the first cache, some KB ahead; panels are
// 16 rows side by side, of which the next are asked for while some are worked on.
enum class ReadingWay {
  kPanels,      // panels only, asked for into the second cache
  kPanelsRows,  // long rows so; short ones row by row, 1 KB ahead
  kFollowed,   // long rows as panels that the processor's own prefetchers follow; short ones row by row, 3 KB
  kRows,       // row by row, 3 KB ahead; else as kPanels
  kRowsTwice,  // row by row, 12 KB ahead; else panels asked for into the first cache, each line twice
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
