// Both sides in one process, over one mapping, so that a race detector sees them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/shm/call_client.h"
#include "common/shm/call_host.h"
#include "common/shm/memory.h"

namespace tandem::shm {
namespace {

RegionShape Shape(uint32_t slots) { return {slots, 16, 4, 32}; }

class CallTest : public ::testing::TestWithParam<uint32_t> {
 protected:
  void Open(uint32_t slots, uint64_t first_sequence) {
    session_ = {77, first_sequence};
    layout_ = *RegionLayout::Of(Shape(slots));
    memory_ = *SharedMemory::Create("call-test", layout_.region_bytes());
    host_ = std::make_unique<CallHost>(memory_.data(), layout_, session_, policy_);
    ASSERT_TRUE(CallClient::CheckHeader(memory_.data(), layout_, session_).ok());
    client_ = std::make_unique<CallClient>(memory_.data(), layout_, session_, policy_);
  }

  // Answers `calls` calls: output = input + layer; layer 9: an error.
  void Serve(int calls) {
    for (int i = 0; i < calls; ++i) {
      IncomingCall call;
      const absl::Status next = host_->Next(absl::Seconds(20), &call);
      ASSERT_TRUE(next.ok()) << next;
      absl::Status status = call.valid;
      if (status.ok() && call.layer == 9) status = absl::NotFoundError("layer 9");
      for (size_t v = 0; status.ok() && v < call.output.size() / 4; ++v) {
        float x;
        std::memcpy(&x, call.input.data() + 4 * v, 4);
        x += static_cast<float>(call.layer);
        std::memcpy(call.output.data() + 4 * v, &x, 4);
      }
      host_->Answer(call, status, {call.sequence, call.rows, call.pairs});
    }
  }

  absl::StatusOr<CallAnswer> Call(uint32_t layer, uint32_t rows, float value) {
    auto to = client_->Prepare(layer, rows, 2, ValueType::kF32, ValueType::kF32);
    if (!to.ok()) return to.status();
    for (size_t v = 0; v < to->input.size() / 4; ++v) std::memcpy(to->input.data() + 4 * v, &value, 4);
    if (const absl::Status rung = client_->Ring(); !rung.ok()) return rung;
    return client_->Await(absl::Now() + absl::Seconds(20));
  }

  WaitPolicy policy_{absl::Microseconds(20)};
  SessionId session_;
  RegionLayout layout_;
  SharedMemory memory_;
  std::unique_ptr<CallHost> host_;
  std::unique_ptr<CallClient> client_;
};

TEST_P(CallTest, AnswersPastTheWrapOfTheFlags) {
  Open(GetParam(), 0xffffff00);
  std::thread host([this] { Serve(600); });
  for (uint32_t i = 0; i < 600; ++i) {
    const uint32_t rows = i % 17;
    const auto answer = Call(i % 9, rows, static_cast<float>(i));
    ASSERT_TRUE(answer.ok()) << answer.status();
    ASSERT_TRUE(answer->status.ok());
    ASSERT_EQ(answer->output.size(), rows * 32 * 4);
    ASSERT_EQ(answer->figures.nanoseconds, uint64_t{0xffffff00} + i);
    ASSERT_EQ(answer->figures.bytes_read, rows);
    for (size_t v = 0; v < answer->output.size() / 4; ++v) {
      float x;
      std::memcpy(&x, answer->output.data() + 4 * v, 4);
      ASSERT_EQ(x, static_cast<float>(i + i % 9));
    }
  }
  host.join();
}
// Makes calls as a device does: plain writes into the region, a bell without a system call.
class Device {
 public:
  Device(const CallClient& client, uint64_t first) : client_(client), next_(first) {}

  bool Call(uint32_t layer, float value, float* answer) { return Wait(Ring(layer, value), answer); }

  // The call's number.
  uint64_t Ring(uint32_t layer, float value) {
    const uint64_t sequence = next_++, slot = sequence % client_.layout().shape().slots;
    SlotControl& control = client_.layout().Control(client_.region(), slot);
    WriteOnce(control.request.sequence, sequence);
    WriteOnce(control.request.epoch, client_.session().epoch);
    WriteOnce(control.request.layer, layer);
    WriteOnce(control.request.rows, 1u);
    WriteOnce(control.request.pairs, 1u);
    WriteOnce(control.request.input_type, static_cast<uint32_t>(ValueType::kF32));
    WriteOnce(control.request.output_type, static_cast<uint32_t>(ValueType::kF32));
    std::memcpy(client_.layout().Input(client_.region(), slot, 1, ValueType::kF32).data(), &value, 4);
    control.bell.sequence.store(static_cast<uint32_t>(sequence), std::memory_order_release);
    return sequence;
  }

  // False: the wait was ended by Abort, or the host's answer is none.
  bool Wait(uint64_t sequence, float* answer) {
    const uint64_t slot = sequence % client_.layout().shape().slots;
    SlotControl& control = client_.layout().Control(client_.region(), slot);
    while (static_cast<int32_t>(control.answered.sequence.load(std::memory_order_acquire) -
                                static_cast<uint32_t>(sequence)) < 0) {
    }
    std::memcpy(answer, client_.layout().Output(client_.region(), slot, 1, ValueType::kF32).data(), 4);
    return ReadOnce(control.answer.status) == 0 && ReadOnce(control.answer.sequence) == sequence;
  }

 private:
  const CallClient& client_;
  uint64_t next_;
};

TEST_P(CallTest, ADeviceMakesCallsBetweenTheClients) {
  Open(GetParam(), 0xfffffff0);
  std::thread host([this] { Serve(3 * 51); });
  for (int round = 0; round < 3; ++round) {
    ASSERT_TRUE(Call(1, 1, 2.0f).ok());
    // The host sleeps by now: the run must wake it, and keep it awake through the pauses of the device.
    absl::SleepFor(absl::Milliseconds(5));
    const auto first = client_->BeginRun(50);
    ASSERT_TRUE(first.ok()) << first.status();
    Device device(*client_, *first);
    for (uint32_t i = 0; i < 50; ++i) {
      if (i % 10 == 0) absl::SleepFor(absl::Milliseconds(1));
      float answer = 0;
      const uint32_t before = client_->Answers();
      ASSERT_TRUE(device.Call(i % 9, static_cast<float>(i), &answer));
      ASSERT_NE(client_->Answers(), before);
      ASSERT_EQ(answer, static_cast<float>(i + i % 9));
    }
    EXPECT_TRUE(client_->EndRun(true, absl::OkStatus()).ok());
  }
  host.join();
}

TEST_P(CallTest, ADeviceHasACallInEverySlot) {
  Open(GetParam(), 0xfffffff0);
  std::thread host([this] { Serve(101); });
  const auto first = client_->BeginRun(100);
  ASSERT_TRUE(first.ok()) << first.status();
  Device device(*client_, *first);
  const auto value = [](uint64_t i) { return static_cast<float>(3 * i); };
  uint64_t rung = 0;
  for (uint64_t i = 0; i < 100; ++i) {
    for (; rung < 100 && rung < i + GetParam(); ++rung) device.Ring(rung % 9, value(rung));
    float answer = 0;
    ASSERT_TRUE(device.Wait(*first + i, &answer)) << "call " << i;
    ASSERT_EQ(answer, value(i) + static_cast<float>(i % 9));
  }
  EXPECT_TRUE(client_->EndRun(true, absl::OkStatus()).ok());
  EXPECT_TRUE(Call(3, 1, 2.0f).ok());
  host.join();
}

TEST_P(CallTest, AnErrorWithinARunIsToldAndEndsNothing) {
  Open(GetParam(), 5);
  std::thread host([this] { Serve(3); });
  const auto first = client_->BeginRun(2);
  ASSERT_TRUE(first.ok());
  Device device(*client_, *first);
  float answer;
  EXPECT_TRUE(device.Call(3, 1, &answer));
  EXPECT_FALSE(device.Call(9, 1, &answer));
  EXPECT_EQ(client_->AnswerStatus(*first + 1), absl::NotFoundError("layer 9"));
  EXPECT_TRUE(client_->EndRun(true, absl::OkStatus()).ok());
  EXPECT_TRUE(Call(3, 1, 2.0f).ok());
  host.join();
}

TEST_P(CallTest, AbortFreesADeviceHoweverManyCallsAreLeft) {
  Open(GetParam(), 5);
  const auto first = client_->BeginRun(30);
  ASSERT_TRUE(first.ok());
  std::thread device_thread([&] {
    Device device(*client_, *first);
    float answer;
    for (int i = 0; i < 30; ++i) EXPECT_FALSE(device.Call(1, 1, &answer));
  });
  absl::SleepFor(absl::Milliseconds(20));
  client_->Abort(absl::UnavailableError("gone"));
  device_thread.join();
  EXPECT_EQ(client_->EndRun(true, absl::OkStatus()), absl::UnavailableError("gone"));
  EXPECT_EQ(client_->BeginRun(1).status(), absl::UnavailableError("gone"));
}

TEST_P(CallTest, ARunThatWasNotMadeToItsEndEndsTheSession) {
  Open(GetParam(), 5);
  ASSERT_TRUE(client_->BeginRun(3).ok());
  EXPECT_EQ(client_->EndRun(false, absl::InternalError("no launch")), absl::InternalError("no launch"));
  EXPECT_FALSE(Call(1, 1, 1.0f).ok());
}

INSTANTIATE_TEST_SUITE_P(Slots, CallTest, ::testing::Values(1, 2, 8));

TEST_F(CallTest, ErrorsOfACallAreItsAnswer) {
  Open(1, 1);
  std::thread host([this] { Serve(2); });
  const auto refused = Call(9, 1, 0);
  ASSERT_TRUE(refused.ok());
  EXPECT_EQ(refused->status, absl::NotFoundError("layer 9"));
  EXPECT_TRUE(refused->output.empty());
  const auto good = Call(1, 1, 0);
  ASSERT_TRUE(good.ok() && good->status.ok());
  host.join();
}

TEST_F(CallTest, TooLargeCallsAreRefusedBeforeTheyAreSent) {
  Open(1, 1);
  EXPECT_TRUE(absl::IsInvalidArgument(client_->Prepare(1, 17, 2, ValueType::kF32, ValueType::kF32).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(client_->Prepare(1, 1, 5, ValueType::kF32, ValueType::kF32).status()));
  std::thread host([this] { Serve(1); });
  EXPECT_TRUE(Call(1, 16, 0).ok()) << "the session goes on";
  host.join();
}

TEST_F(CallTest, PreparedButNotSentIsForgotten) {
  Open(2, 1);
  std::thread host([this] { Serve(1); });
  ASSERT_TRUE(client_->Prepare(9, 1, 2, ValueType::kF32, ValueType::kF32).ok());
  const auto answer = Call(3, 1, 1);
  ASSERT_TRUE(answer.ok() && answer->status.ok());
  host.join();
}

TEST_F(CallTest, LateAnswersAreNotWaitedForAndNeverTaken) {
  Open(1, 1);
  ASSERT_TRUE(client_->Prepare(1, 1, 2, ValueType::kF32, ValueType::kF32).ok());
  ASSERT_TRUE(client_->Ring().ok());
  EXPECT_TRUE(absl::IsDeadlineExceeded(client_->Await(absl::Now() + absl::Milliseconds(30)).status()));
  // What a waiting device sees: the number, and that the call was aborted.
  SlotControl& control = layout_.Control(memory_.data(), 0);
  EXPECT_EQ(control.answered.sequence, 1u);
  EXPECT_EQ(control.answer.status, kStatusAborted);
  Serve(1);
  EXPECT_TRUE(absl::IsDeadlineExceeded(Call(1, 1, 0).status())) << "the session is over";
}

TEST_F(CallTest, AbortEndsAWaitAtOnce) {
  Open(1, 1);
  std::thread watchdog([this] {
    absl::SleepFor(absl::Milliseconds(30));
    client_->Abort(absl::UnavailableError("gone"));
    client_->Abort(absl::UnavailableError("again"));
  });
  const absl::Time before = absl::Now();
  EXPECT_EQ(Call(1, 1, 0).status(), absl::UnavailableError("gone"));
  EXPECT_LT(absl::Now() - before, absl::Seconds(10));
  watchdog.join();
  EXPECT_EQ(Call(1, 1, 0).status(), absl::UnavailableError("gone"));
}

TEST_F(CallTest, AbortDoesNotLoseAnAnswerThatIsThere) {
  Open(1, 1);
  ASSERT_TRUE(client_->Prepare(1, 1, 2, ValueType::kF32, ValueType::kF32).ok());
  ASSERT_TRUE(client_->Ring().ok());
  Serve(1);
  client_->Abort(absl::UnavailableError("gone"));
  const auto answer = client_->Await(absl::Now());
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_TRUE(answer->status.ok());
  EXPECT_EQ(Call(1, 1, 0).status(), absl::UnavailableError("gone"));
}

TEST_F(CallTest, AbortsRaceAnswers) {
  for (int i = 0; i < 200; ++i) {
    Open(1, 1);
    std::thread host([this] {
      IncomingCall call;
      if (!host_->Next(absl::Seconds(20), &call).ok()) return;  // stopped: it was never rung
      const float x = 3;
      std::memcpy(call.output.data(), &x, 4);
      host_->Answer(call, absl::OkStatus(), {});
    });
    std::thread watchdog([this] { client_->Abort(absl::UnavailableError("gone")); });
    const auto answer = Call(2, 3, 1);
    if (answer.ok()) {
      float x;
      std::memcpy(&x, answer->output.data(), 4);
      EXPECT_EQ(x, 3);
    } else {
      EXPECT_EQ(answer.status(), absl::UnavailableError("gone"));
      host_->Stop();
    }
    watchdog.join();
    host.join();
  }
}

TEST_F(CallTest, StopEndsTheHost) {
  Open(4, 1);
  std::thread stopper([this] {
    absl::SleepFor(absl::Milliseconds(20));
    host_->Stop();
  });
  IncomingCall call;
  EXPECT_TRUE(absl::IsCancelled(host_->Next(absl::Seconds(20), &call)));
  stopper.join();
  EXPECT_TRUE(absl::IsCancelled(host_->Next(absl::Seconds(20), &call)));
}

TEST_F(CallTest, ForeignRegionsAreRefused) {
  Open(1, 1);
  EXPECT_FALSE(CallClient::CheckHeader(memory_.data(), layout_, {78, 1}).ok());
  EXPECT_FALSE(CallClient::CheckHeader(memory_.data(), layout_, {77, 2}).ok());
  for (size_t at = 0; at < sizeof(RegionHeader); ++at) {
    memory_.data()[at] ^= 0x40;
    EXPECT_TRUE(absl::IsFailedPrecondition(CallClient::CheckHeader(memory_.data(), layout_, session_))) << at;
    memory_.data()[at] ^= 0x40;
  }
}

TEST(RegionLayoutTest, PartsDoNotOverlapAndStayInside) {
  for (const RegionShape& shape :
       {RegionShape{1, 1, 1, 1}, RegionShape{4, 320, 8, 7168}, RegionShape{64, 3, 7, 5}}) {
    const auto layout = RegionLayout::Of(shape);
    ASSERT_TRUE(layout.ok());
    std::vector<uint8_t> memory(layout->region_bytes() + 128);
    const auto offset = 128 - reinterpret_cast<uintptr_t>(memory.data()) % 128;
    const std::span<uint8_t> region(memory.data() + offset, layout->region_bytes());
    const uint8_t* end = region.data() + kHeaderBytes;
    for (uint64_t s = 0; s < shape.slots; ++s) {
      const auto* control = reinterpret_cast<uint8_t*>(&layout->Control(region, s));
      EXPECT_GE(control, end);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(control) % 128, 0u);
      end = control + sizeof(SlotControl);
      for (const auto& part : {layout->Ids(region, s, shape.max_rows, shape.max_pairs),
                               layout->Weights(region, s, shape.max_rows, shape.max_pairs),
                               layout->Input(region, s, shape.max_rows, ValueType::kF32),
                               layout->Output(region, s, shape.max_rows, ValueType::kF64)}) {
        EXPECT_GE(part.data(), end);
        end = part.data() + part.size();
      }
      EXPECT_LE(end, region.data() + region.size());
    }
  }
}

TEST(RegionLayoutTest, RefusesShapesThatCannotBe) {
  for (const RegionShape& shape :
       {RegionShape{0, 1, 1, 1}, RegionShape{3, 1, 1, 1}, RegionShape{128, 1, 1, 1}, RegionShape{1, 0, 1, 1},
        RegionShape{1, 1, 0, 1}, RegionShape{1, 1, 1, 0}, RegionShape{1, ~0u, 1, 1},
        RegionShape{1, 1, ~0u, 1}, RegionShape{1, 1, 1, ~0u}}) {
    EXPECT_TRUE(absl::IsInvalidArgument(RegionLayout::Of(shape).status()));
  }
}

}  // namespace
}  // namespace tandem::shm
