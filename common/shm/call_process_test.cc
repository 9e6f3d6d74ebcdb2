// Two real processes, one of which is killed.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <thread>

#include "absl/time/clock.h"
#include "common/shm/call_client.h"
#include "common/shm/call_host.h"
#include "common/shm/memory.h"
#include "common/shm/round_trip.h"

namespace tandem::shm {
namespace {

constexpr WaitPolicy kPolicy{absl::Microseconds(5)};

struct Sides {
  RegionLayout layout = *RegionLayout::Of({1, 4, 2, 64});
  SharedMemory memory = *SharedMemory::Create("process-test", layout.region_bytes());
  SessionId session;
  std::unique_ptr<CallHost> host;

  explicit Sides(uint64_t epoch) : session{epoch, 1} {
    host = std::make_unique<CallHost>(memory.data(), layout, session, kPolicy);
  }
};

pid_t Fork(const std::function<void()>& life) {
  const pid_t child = fork();
  if (child == 0) {
    life();
    _exit(0);
  }
  return child;
}

void Kill(pid_t child) {
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
}

enum class Stage { kBeforeBell, kDuringWork, kAfterAnswer };

void ServeUntil(CallHost& host, Stage stage) {
  if (stage == Stage::kBeforeBell) pause();
  for (;;) {
    IncomingCall call;
    if (!host.Next(absl::Seconds(60), &call).ok()) _exit(1);
    if (stage == Stage::kDuringWork) pause();
    host.Answer(call, absl::OkStatus(), {});
    if (stage == Stage::kAfterAnswer) pause();
  }
}

absl::Status CallOnce(CallClient& client, absl::Duration patience) {
  const auto to = client.Prepare(1, 2, 2, ValueType::kBf16, ValueType::kF64);
  if (!to.ok()) return to.status();
  if (const absl::Status rung = client.Ring(); !rung.ok()) return rung;
  const auto answer = client.Await(absl::Now() + patience);
  return answer.ok() ? answer->status : answer.status();
}

TEST(CallProcessTest, HostKilledAtEachStageAndANewSession) {
  for (const Stage stage : {Stage::kBeforeBell, Stage::kDuringWork, Stage::kAfterAnswer}) {
    Sides sides(1);
    const pid_t host = Fork([&] { ServeUntil(*sides.host, stage); });
    CallClient client(sides.memory.data(), sides.layout, sides.session, kPolicy);
    if (stage == Stage::kAfterAnswer) {
      ASSERT_TRUE(CallOnce(client, absl::Seconds(30)).ok());
    }
    // The lease, in small: says when the process is gone.
    std::thread lease([&] {
      absl::SleepFor(absl::Milliseconds(50));
      Kill(host);
      client.Abort(absl::UnavailableError("killed"));
    });
    if (stage != Stage::kAfterAnswer) {
      EXPECT_EQ(CallOnce(client, absl::Seconds(30)), absl::UnavailableError("killed"));
    }
    lease.join();
    EXPECT_EQ(CallOnce(client, absl::Seconds(30)), absl::UnavailableError("killed"));

    Sides anew(2);
    const pid_t next = Fork([&] {
      IncomingCall call;
      while (anew.host->Next(absl::Seconds(60), &call).ok()) anew.host->Answer(call, call.valid, {});
    });
    CallClient again(anew.memory.data(), anew.layout, anew.session, kPolicy);
    for (int i = 0; i < 50; ++i) ASSERT_TRUE(CallOnce(again, absl::Seconds(30)).ok());
    Kill(next);
  }
}

TEST(CallProcessTest, ClientKilledHostIsFreeToStop) {
  Sides sides(1);
  const pid_t client = Fork([&] {
    CallClient c(sides.memory.data(), sides.layout, sides.session, kPolicy);
    for (int i = 0; i < 3; ++i) {
      if (!CallOnce(c, absl::Seconds(30)).ok()) _exit(1);
    }
    const auto to = c.Prepare(1, 2, 2, ValueType::kBf16, ValueType::kF64);
    if (to.ok() && c.Ring().ok()) pause();
  });
  IncomingCall call;
  for (int i = 0; i < 4; ++i) {
    ASSERT_TRUE(sides.host->Next(absl::Seconds(30), &call).ok());
    if (i == 3) Kill(client);  // in the middle of the fourth call
    std::memset(call.output.data(), 1, call.output.size());
    sides.host->Answer(call, absl::OkStatus(), {});
  }
  EXPECT_TRUE(absl::IsDeadlineExceeded(sides.host->Next(absl::Milliseconds(20), &call)));
  sides.host->Stop();
  EXPECT_TRUE(absl::IsCancelled(sides.host->Next(absl::Seconds(30), &call)));
}

// An answer that an earlier session's host still writes, into a region that a client took for its own: by the
// epoch it is known for what it is.
TEST(CallProcessTest, AnswersOfAnotherEpochAreNotTaken) {
  Sides sides(1);
  CallClient client(sides.memory.data(), sides.layout, {2, 1}, kPolicy);
  const pid_t host = Fork([&] {
    IncomingCall call;
    call.sequence = 1;
    absl::SleepFor(absl::Milliseconds(30));
    sides.host->Answer(call, absl::OkStatus(), {});
  });
  EXPECT_TRUE(absl::IsDataLoss(CallOnce(client, absl::Seconds(30))));
  Kill(host);
  IncomingCall call;
  EXPECT_TRUE(absl::IsDataLoss(sides.host->Next(absl::Seconds(1), &call)));
}

TEST(CallProcessTest, MeasuresRoundTrips) {
  RingMeasurement how;
  how.calls = 2000;
  how.warm_up = 10;
  how.wait.spin = absl::ZeroDuration();
  how.rows = 1;
  const auto r = MeasureRing(how);
  ASSERT_TRUE(r.ok()) << r.status();
  EXPECT_GT(r->min, 0);
  EXPECT_LE(r->min, r->p50);
  EXPECT_LE(r->p50, r->p99);
  EXPECT_GE(r->calls, 1);
  EXPECT_LE(r->calls, 2000);
}

}  // namespace
}  // namespace tandem::shm
