#include "common/shm/memory.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>

namespace tandem::shm {
namespace {

TEST(SharedMemoryTest, IsZeroedAndCannotBeResizedOrUnsealed) {
  auto memory = SharedMemory::Create("test", 10'000);
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_EQ(memory->data().size(), 10'000u);
  for (const uint8_t byte : memory->data()) ASSERT_EQ(byte, 0);
  const int fd = memory->fd().get();
  EXPECT_EQ(ftruncate(fd, 4096), -1);
  EXPECT_EQ(errno, EPERM);
  EXPECT_EQ(ftruncate(fd, 20'000), -1);
  EXPECT_EQ(errno, EPERM);
  EXPECT_EQ(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), -1);
  EXPECT_TRUE(fcntl(fd, F_GETFD) & FD_CLOEXEC);
}

TEST(SharedMemoryTest, AdoptedMemoryIsTheSame) {
  auto first = SharedMemory::Create("test", 8192);
  ASSERT_TRUE(first.ok());
  auto second = SharedMemory::Adopt(*first->fd().Duplicate(), 8192);
  ASSERT_TRUE(second.ok()) << second.status();
  first->data()[8191] = 42;
  EXPECT_EQ(second->data()[8191], 42);
  SharedMemory moved = *std::move(second);
  moved.data()[0] = 7;
  *first = SharedMemory();
  EXPECT_EQ(moved.data()[0], 7);
}

TEST(SharedMemoryTest, RefusesWhatIsNotSealedOrOfAnotherSize) {
  FileDescriptor unsealed(memfd_create("x", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(ftruncate(unsealed.get(), 4096), 0);
  EXPECT_TRUE(absl::IsFailedPrecondition(SharedMemory::Adopt(*unsealed.Duplicate(), 4096).status()));
  ASSERT_EQ(fcntl(unsealed.get(), F_ADD_SEALS, F_SEAL_GROW), 0);
  EXPECT_TRUE(absl::IsFailedPrecondition(SharedMemory::Adopt(*unsealed.Duplicate(), 4096).status()));
  ASSERT_EQ(fcntl(unsealed.get(), F_ADD_SEALS, F_SEAL_SHRINK), 0);
  EXPECT_TRUE(SharedMemory::Adopt(*unsealed.Duplicate(), 4096).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(SharedMemory::Adopt(*unsealed.Duplicate(), 8192).status()));
  EXPECT_TRUE(absl::IsFailedPrecondition(SharedMemory::Adopt(*unsealed.Duplicate(), 0).status()));
  FileDescriptor file(open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
  EXPECT_TRUE(absl::IsFailedPrecondition(SharedMemory::Adopt(std::move(file), 4096).status()));
  EXPECT_FALSE(SharedMemory::Adopt(FileDescriptor(), 4096).ok());
}

TEST(SharedMemoryTest, RefusesSizesThatCannotBe) {
  EXPECT_TRUE(absl::IsInvalidArgument(SharedMemory::Create("test", 0).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(SharedMemory::Create("test", ~uint64_t{0}).status()));
}

}  // namespace
}  // namespace tandem::shm
