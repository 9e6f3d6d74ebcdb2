#include "cli/serve/line_writer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <string>

#include "absl/strings/str_cat.h"

namespace tandem::cli {
namespace {

using ::testing::EndsWith;
using ::testing::StartsWith;

std::string ReadAll(int fd) {
  std::string out;
  char buffer[65536];
  for (ssize_t n; (n = read(fd, buffer, sizeof buffer)) > 0;) out.append(buffer, static_cast<size_t>(n));
  return out;
}

TEST(LineWriter, WritesLinesInOrder) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  {
    LineWriter writer(ends[1]);
    writer.Add("one");
    writer.Add("");
    writer.Add("two");
  }
  close(ends[1]);
  EXPECT_EQ(ReadAll(ends[0]), "one\n\ntwo\n");
  close(ends[0]);
}

// Far more than a pipe holds: Add comes back all the same, and the reader is told what it missed.
TEST(LineWriter, AReaderThatStopsHoldsNobodyUp) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const std::string line(1000, 'x');
  std::string got;
  std::thread reader;
  {
    LineWriter writer(ends[1], /*most_lines=*/100);
    for (int i = 0; i < 1000; ++i) writer.Add(absl::StrCat(i, " ", line));
    reader = std::thread([&] { got = ReadAll(ends[0]); });
  }
  close(ends[1]);
  reader.join();
  close(ends[0]);
  EXPECT_THAT(got, StartsWith("0 x"));
  EXPECT_THAT(got, EndsWith(" lines are lost: nobody read them)\n"));
}

// Nobody reads at all: the end does not wait for ever.
TEST(LineWriter, EndsWithoutAReader) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  {
    LineWriter writer(ends[1]);
    for (int i = 0; i < 200; ++i) writer.Add(std::string(1000, 'x'));
  }
  close(ends[0]);  // now the thread ends, too
}

}  // namespace
}  // namespace tandem::cli
