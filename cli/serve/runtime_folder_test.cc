#include "cli/serve/runtime_folder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>
#include <vector>

namespace tandem::cli {
namespace {

namespace fs = std::filesystem;
using ::testing::StartsWith;

class RuntimeFolderTest : public ::testing::Test {
 protected:
  RuntimeFolderTest() {
    std::string name = "/tmp/runtime-test-XXXXXX";
    place_ = mkdtemp(name.data());
    setenv("XDG_RUNTIME_DIR", place_.c_str(), 1);
  }
  ~RuntimeFolderTest() override {
    unsetenv("XDG_RUNTIME_DIR");
    fs::remove_all(place_);
  }
  std::string place_;
};

TEST_F(RuntimeFolderTest, IsPrivateAndGoesAway) {
  auto folder = RuntimeFolder::Make();
  ASSERT_TRUE(folder.ok()) << folder.status();
  const std::string path = (*folder)->path();
  EXPECT_THAT(path, StartsWith(place_ + "/tandem-"));
  struct stat info {};
  ASSERT_EQ(stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0700u);
  std::ofstream(path + "/expert0.sock") << "left over";
  folder->reset();
  EXPECT_FALSE(fs::exists(path));
}

TEST_F(RuntimeFolderTest, LivingOnesAreLeftAlone) {
  const auto first = RuntimeFolder::Make();
  const auto second = RuntimeFolder::Make();
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_NE((*first)->path(), (*second)->path());
  EXPECT_TRUE(fs::exists((*first)->path()));
}

TEST_F(RuntimeFolderTest, DeadOnesAreTakenAway) {
  const std::string dead = place_ + "/tandem-dead00";
  fs::create_directory(dead);
  std::ofstream(dead + "/lock") << "";
  std::ofstream(dead + "/attention.sock") << "";
  const std::string foreign = place_ + "/tandem-notes";  // no lock: not ours to judge
  fs::create_directory(foreign);
  ASSERT_TRUE(RuntimeFolder::Make().ok());
  EXPECT_FALSE(fs::exists(dead));
  EXPECT_TRUE(fs::exists(foreign));
}

TEST_F(RuntimeFolderTest, APlaceWhoseNameIsTooLongForSocketsIsNotUsed) {
  setenv("XDG_RUNTIME_DIR", ("/" + std::string(120, 'x')).c_str(), 1);
  const auto folder = RuntimeFolder::Make();
  ASSERT_TRUE(folder.ok()) << folder.status();
  EXPECT_THAT((*folder)->path(), StartsWith("/tmp/tandem-"));
}

TEST_F(RuntimeFolderTest, APlaceWhoseNameMeansSomethingInAddressesIsNotUsed) {
  for (const char* name : {"/a,b", "/a:b", "/a%20b"}) {
    fs::create_directory(place_ + name);
    setenv("XDG_RUNTIME_DIR", (place_ + name).c_str(), 1);
    const auto folder = RuntimeFolder::Make();
    ASSERT_TRUE(folder.ok()) << folder.status();
    EXPECT_THAT((*folder)->path(), StartsWith("/tmp/tandem-"));
  }
}

TEST_F(RuntimeFolderTest, ManyStartAtTheSameMoment) {
  std::atomic<int> failed = 0, gone = 0;
  std::vector<std::thread> starts;
  for (int i = 0; i < 8; ++i) {
    starts.emplace_back([&] {
      for (int n = 0; n < 200; ++n) {
        const auto folder = RuntimeFolder::Make();
        if (!folder.ok()) {
          ++failed;
        } else if (!fs::exists((*folder)->path() + "/lock")) {
          ++gone;
        }
      }
    });
  }
  for (std::thread& start : starts) start.join();
  EXPECT_EQ(failed, 0);
  EXPECT_EQ(gone, 0);
}

}  // namespace
}  // namespace tandem::cli
