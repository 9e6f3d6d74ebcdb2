#include "cli/flags/config_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <filesystem>
#include <fstream>

namespace tandem::cli {
namespace {

using ::testing::HasSubstr;

class ConfigFile : public ::testing::Test {
 protected:
  ~ConfigFile() override { std::remove(path_.c_str()); }
  const std::string& WriteFile(const std::string& text) {
    std::ofstream(path_, std::ios::binary) << text;
    return path_;
  }
  const std::string path_ =
      ::testing::TempDir() + "config-file-" + ::testing::UnitTest::GetInstance()->current_test_info()->name();
};

TEST_F(ConfigFile, Reads) {
  const auto entries =
      ReadConfigFile(WriteFile("# a comment\n\nport = 8000\r\n[serve]\n  max_batch_size=4  # four\nmodel = "
                               "\"a # b\"\n[chat]\nsystem =\n"));
  ASSERT_TRUE(entries.ok()) << entries.status();
  ASSERT_EQ(entries->size(), 4u);
  EXPECT_EQ((*entries)[0].section, "");
  EXPECT_EQ((*entries)[0].key, "port");
  EXPECT_EQ((*entries)[0].value, "8000");
  EXPECT_EQ((*entries)[1].section, "serve");
  EXPECT_EQ((*entries)[1].key, "max-batch-size");
  EXPECT_EQ((*entries)[1].value, "4");
  EXPECT_EQ((*entries)[1].line, 5);
  EXPECT_EQ((*entries)[2].value, "a # b");
  EXPECT_EQ((*entries)[3].value, "");
}

TEST_F(ConfigFile, SingleQuotesAndAByteOrderMark) {
  const auto entries = ReadConfigFile(
      WriteFile("\xEF\xBB\xBFport = '8000'\nsystem = 'say \"hi\" # now'  # twice\nmodel = \"it's\"\n"
                "model-name = it's\n"));
  ASSERT_TRUE(entries.ok()) << entries.status();
  ASSERT_EQ(entries->size(), 4u);
  EXPECT_EQ((*entries)[0].key, "port");
  EXPECT_EQ((*entries)[0].value, "8000");
  EXPECT_EQ((*entries)[1].value, "say \"hi\" # now");
  EXPECT_EQ((*entries)[2].value, "it's");
  EXPECT_EQ((*entries)[3].value, "it's");
  EXPECT_EQ(ReadConfigFile(WriteFile("\xEF\xBB\xBF[serve]\n"))->size(), 0u);
}

TEST_F(ConfigFile, ErrorsNameTheLine) {
  for (const char* bad : {"\nnonsense\n", "\n[serve\n", "\n= 3\n", "\nmodel = \"x\n", "\nmodel = 'x\n",
                          "\nmodel = 'x\"\n", "\nmodel = \"x\" y\n"}) {
    const std::string path = WriteFile(bad);
    const auto entries = ReadConfigFile(path);
    ASSERT_FALSE(entries.ok()) << bad;
    EXPECT_THAT(std::string(entries.status().message()), HasSubstr(path + ":2: "));
  }
}

TEST_F(ConfigFile, RefusesWhatIsNoText) {
  EXPECT_EQ(ReadConfigFile("/nonexistent/file").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReadConfigFile(WriteFile(std::string("a\0b", 3))).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ReadConfigFile(WriteFile(std::string(2 << 20, '#'))).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(ReadConfigFile(std::filesystem::temp_directory_path().string()).ok());
}

}  // namespace
}  // namespace tandem::cli
