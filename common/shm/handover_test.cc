#include "common/shm/handover.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <fstream>

#include "absl/time/clock.h"

namespace tandem::shm {
namespace {

using ::testing::HasSubstr;

class HandoverTest : public ::testing::Test {
 protected:
  HandoverTest() : path_(::testing::TempDir() + "/tandem_handover_" + std::to_string(getpid())) {}
  ~HandoverTest() override { unlink(path_.c_str()); }

  absl::StatusOr<FileDescriptor> Receive(const std::string& token) {
    return ReceiveDescriptor(path_, token, absl::Seconds(5));
  }
  // A socket that listens there, or did.
  FileDescriptor Bind() {
    sockaddr_un to{};
    to.sun_family = AF_UNIX;
    std::strcpy(to.sun_path, path_.c_str());
    FileDescriptor fd(socket(AF_UNIX, SOCK_STREAM, 0));
    EXPECT_EQ(bind(fd.get(), reinterpret_cast<sockaddr*>(&to), sizeof to), 0);
    EXPECT_EQ(listen(fd.get(), 4), 0);
    return fd;
  }
  std::string path_;
};

TEST_F(HandoverTest, HandsOverOnceAgainstTheToken) {
  auto server = HandoverServer::Start(path_, geteuid());
  ASSERT_TRUE(server.ok()) << server.status();
  struct stat info {};
  ASSERT_EQ(stat(path_.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0600u);
  auto memory = SharedMemory::Create("test", 4096);
  auto other = SharedMemory::Create("test", 4096);
  const auto token = (*server)->Offer(memory->fd()), other_token = (*server)->Offer(other->fd());
  ASSERT_TRUE(token.ok() && other_token.ok());
  EXPECT_NE(*token, *other_token);
  auto fd = Receive(*token);
  ASSERT_TRUE(fd.ok()) << fd.status();
  auto adopted = SharedMemory::Adopt(*std::move(fd), 4096);
  ASSERT_TRUE(adopted.ok());
  memory->data()[5] = 1;
  EXPECT_EQ(adopted->data()[5], 1);
  EXPECT_TRUE(absl::IsPermissionDenied(Receive(*token).status())) << "a token is good once";
  (*server)->Withdraw(*other_token);
  EXPECT_TRUE(absl::IsPermissionDenied(Receive(*other_token).status()));
  EXPECT_TRUE(absl::IsPermissionDenied(Receive(std::string(32, '0')).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(Receive("short").status()));
  server->reset();
  EXPECT_NE(stat(path_.c_str(), &info), 0) << "the socket file stayed";
  EXPECT_TRUE(absl::IsUnavailable(Receive(*token).status()));
}

TEST_F(HandoverTest, RefusesAnotherUser) {
  auto server = HandoverServer::Start(path_, geteuid() + 1);
  ASSERT_TRUE(server.ok()) << server.status();
  auto memory = SharedMemory::Create("test", 4096);
  const auto token = (*server)->Offer(memory->fd());
  EXPECT_FALSE(Receive(*token).ok());
  EXPECT_FALSE(Receive(*token).ok());
}

TEST_F(HandoverTest, SilentAndRudePeersHoldNobodyForLong) {
  auto server = HandoverServer::Start(path_, geteuid());
  ASSERT_TRUE(server.ok());
  auto memory = SharedMemory::Create("test", 4096);
  const auto token = (*server)->Offer(memory->fd());
  sockaddr_un to{};
  to.sun_family = AF_UNIX;
  std::strcpy(to.sun_path, path_.c_str());
  const FileDescriptor silent(socket(AF_UNIX, SOCK_STREAM, 0)), rude(socket(AF_UNIX, SOCK_STREAM, 0));
  ASSERT_EQ(connect(rude.get(), reinterpret_cast<sockaddr*>(&to), sizeof to), 0);
  ASSERT_EQ(send(rude.get(), "abc", 3, 0), 3);
  shutdown(rude.get(), SHUT_RDWR);
  ASSERT_EQ(connect(silent.get(), reinterpret_cast<sockaddr*>(&to), sizeof to), 0);
  EXPECT_TRUE(Receive(*token).ok());
}

TEST_F(HandoverTest, ReplacesAStaleSocketButNothingElse) {
  Bind().Reset();  // the file stays, nobody listens
  EXPECT_TRUE(absl::IsUnavailable(Receive(std::string(32, '0')).status()));
  EXPECT_TRUE(HandoverServer::Start(path_, geteuid()).ok());
  {
    const FileDescriptor listening = Bind();
    EXPECT_TRUE(absl::IsAlreadyExists(HandoverServer::Start(path_, geteuid()).status()));
  }
  unlink(path_.c_str());
  std::ofstream(path_) << "precious";
  const auto refused = HandoverServer::Start(path_, geteuid());
  EXPECT_TRUE(absl::IsAlreadyExists(refused.status()));
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr(path_));
  EXPECT_TRUE(
      absl::IsInvalidArgument(HandoverServer::Start("/tmp/" + std::string(200, 'x'), geteuid()).status()));
  EXPECT_FALSE(HandoverServer::Start("/no/such/folder/socket", geteuid()).ok());
}

}  // namespace
}  // namespace tandem::shm
