#include "common/topology/cpu_list.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace tandem::topology {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

TEST(CpuList, ReadsNumbersAndRangesInOrder) {
  EXPECT_THAT(ParseCpuList("0-3,16").value(), ElementsAre(0, 1, 2, 3, 16));
  EXPECT_THAT(ParseCpuList("7,2-3,0").value(), ElementsAre(7, 2, 3, 0));
  EXPECT_THAT(ParseCpuList("5").value(), ElementsAre(5));
  EXPECT_THAT(ParseCpuList("").value(), IsEmpty());
}

TEST(CpuList, RefusesWhatIsNotAList) {
  for (const char* bad : {"a", "1,", ",1", "1-", "-1", "3-1", "1--2", "1-2-3", "0x1", " 1", "1 ",
                          "99999999999", "8192", "0-8192", "1;2", "+1"}) {
    const auto cpus = ParseCpuList(bad);
    ASSERT_FALSE(cpus.ok()) << bad;
    EXPECT_EQ(cpus.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(cpus.status().message()), HasSubstr(bad));
  }
}

TEST(CpuList, RefusesACpuNamedTwice) {
  const auto cpus = ParseCpuList("0-4,3");
  ASSERT_FALSE(cpus.ok());
  EXPECT_THAT(std::string(cpus.status().message()), HasSubstr("CPU 3 is named twice"));
}

TEST(CpuList, FormatsTheShortestTextThatReadsBack) {
  EXPECT_EQ(FormatCpuList({0, 1, 2, 3, 16}), "0-3,16");
  EXPECT_EQ(FormatCpuList({0, 1}), "0,1");
  EXPECT_EQ(FormatCpuList({3, 2, 1}), "3,2,1");
  EXPECT_EQ(FormatCpuList({}), "");
  for (const char* text : {"0-3,16", "7,2,3,0", "12"}) {
    EXPECT_EQ(FormatCpuList(ParseCpuList(text).value()), text);
  }
}

}  // namespace
}  // namespace tandem::topology
