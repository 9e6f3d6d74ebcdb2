// A peer that writes anything anywhere in the region, at any moment. Run under ASan and UBSan this shows that
// neither side reads or writes outside its arrays; without, that neither crashes or hangs.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "common/shm/call_client.h"
#include "common/shm/call_host.h"

namespace tandem::shm {
namespace {

// The region on the heap and of its exact size, so that a sanitizer sees every step outside.
struct Region {
  RegionLayout layout = *RegionLayout::Of({2, 3, 2, 8});
  uint8_t* data = static_cast<uint8_t*>(std::aligned_alloc(4096, layout.region_bytes()));
  Region() { std::memset(data, 0, layout.region_bytes()); }
  ~Region() { std::free(data); }
  std::span<uint8_t> span() const { return {data, layout.region_bytes()}; }
};

uint32_t Nasty(std::mt19937_64& random) {
  constexpr uint32_t kValues[] = {0,          1,          2,  3,  4,   0x7fffffff, 0x80000000,
                                  0xffffffff, 0xfffffffe, 16, 17, 512, 513};
  return random() % 4 != 0 ? kValues[random() % std::size(kValues)] : static_cast<uint32_t>(random());
}

// Touches all that it is given.
uint64_t Sum(std::span<const uint8_t> bytes) {
  uint64_t sum = 0;
  for (const uint8_t b : bytes) sum += b;
  return sum;
}

TEST(HostileTest, HostSurvivesAnyRequest) {
  std::mt19937_64 random(1);
  int answered = 0, refused = 0, ended = 0;
  uint64_t sum = 0;
  for (int session = 0; session < 3000; ++session) {
    const Region region;
    const SessionId id{random(), random()};
    CallHost host(region.span(), region.layout, id, {absl::ZeroDuration()});
    for (uint64_t n = 0; n < 20; ++n) {
      const uint64_t sequence = id.first_sequence + n;
      SlotControl& control = region.layout.Control(region.span(), sequence % 2);
      control.request.sequence = random() % 30 == 0 ? random() : sequence;
      control.request.epoch = random() % 30 == 0 ? random() : id.epoch;
      control.request.layer = random() % 4 != 0 ? 1 : Nasty(random);
      control.request.rows = random() % 4 != 0 ? 2 : Nasty(random);
      control.request.pairs = random() % 4 != 0 ? 2 : Nasty(random);
      control.request.input_type = random() % 4 != 0 ? 2 : Nasty(random);
      control.request.output_type = random() % 4 != 0 ? 1 : Nasty(random);
      control.request.precision = random() % 4 != 0 ? static_cast<uint32_t>(random() % 2) : Nasty(random);
      control.bell.sequence = random() % 30 == 0 ? Nasty(random) : static_cast<uint32_t>(sequence);
      control.bell.sleeping = Nasty(random);
      control.bell.awake = random() % 4 != 0 ? 0 : Nasty(random);
      for (uint64_t at = 0; at < kHeaderBytes; at += 8) region.data[at] = static_cast<uint8_t>(random());
      IncomingCall call;
      const absl::Status next = host.Next(absl::ZeroDuration(), &call);
      if (!next.ok()) {
        EXPECT_TRUE(absl::IsDataLoss(next) || absl::IsDeadlineExceeded(next)) << next;
        ++ended;
        break;
      }
      ASSERT_LE(call.rows, 3u);
      ASSERT_LE(call.pairs, 2u);
      sum += Sum(call.ids) + Sum(call.weights) + Sum(call.input);
      if (!call.output.empty()) std::memset(call.output.data(), 1, call.output.size());
      host.Answer(call, call.valid, {});
      ++(call.valid.ok() ? answered : refused);
    }
  }
  EXPECT_GT(answered, 1000);
  EXPECT_GT(refused, 1000);
  EXPECT_GT(ended, 1000);
  EXPECT_GT(sum + 1, 0u);
}

TEST(HostileTest, ClientSurvivesAnyAnswer) {
  std::mt19937_64 random(2);
  int good = 0, refused = 0, broken = 0;
  for (int session = 0; session < 3000; ++session) {
    const Region region;
    const SessionId id{random(), random()};
    CallHost host(region.span(), region.layout, id, {absl::ZeroDuration()});  // only to lay it out
    CallClient client(region.span(), region.layout, id, {absl::ZeroDuration()});
    for (uint64_t n = 0; n < 20; ++n) {
      const uint64_t sequence = id.first_sequence + n;
      const auto rows = static_cast<uint32_t>(random() % 4);
      const auto to = client.Prepare(1, rows, 2, ValueType::kBf16, ValueType::kF64);
      ASSERT_TRUE(to.ok()) << to.status();
      ASSERT_TRUE(client.Ring().ok());
      SlotControl& control = region.layout.Control(region.span(), sequence % 2);
      control.answer.sequence = random() % 30 == 0 ? random() : sequence;
      control.answer.epoch = random() % 30 == 0 ? random() : id.epoch;
      control.answer.status = random() % 2 == 0 ? 0 : Nasty(random);
      control.answer.message_bytes = Nasty(random);
      for (char& c : control.message) c = static_cast<char>(random());
      control.answered.sleeping = Nasty(random);
      control.answered.sequence = random() % 30 == 0 ? Nasty(random) : static_cast<uint32_t>(sequence);
      const auto answer = client.Await(absl::Now() + absl::Milliseconds(5));
      if (!answer.ok()) {
        EXPECT_FALSE(client.Prepare(1, 1, 1, ValueType::kF32, ValueType::kF32).ok());
        ++broken;
        break;
      }
      if (answer->status.ok()) {
        ASSERT_EQ(answer->output.size(), rows * 8 * 8);
        Sum(answer->output);
        ++good;
      } else {
        ASSERT_LE(answer->status.message().size(), kMessageBytes);
        ++refused;
      }
    }
  }
  EXPECT_GT(good, 1000);
  EXPECT_GT(refused, 500);
  EXPECT_GT(broken, 1000);
}

// While a well-behaved client calls, somebody scribbles over the steering fields.
TEST(HostileTest, ScribblingWhileCallsRun) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const Region region;
    const SessionId id{1, 1};
    CallHost host(region.span(), region.layout, id, {absl::Microseconds(5)});
    CallClient client(region.span(), region.layout, id, {absl::Microseconds(5)});
    std::atomic<bool> done{false};
    std::thread scribbler([&] {
      std::mt19937_64 random(seed);
      while (!done) {
        SlotControl& control = region.layout.Control(region.span(), random() % 2);
        WriteOnce(control.request.rows, Nasty(random));
        WriteOnce(control.request.pairs, Nasty(random));
        WriteOnce(control.request.output_type, Nasty(random));
        if (random() % 1000 == 0) WriteOnce(control.answer.status, Nasty(random));
        if (random() % 1000 == 0) WriteOnce(control.answer.message_bytes, Nasty(random));
      }
    });
    std::thread server([&] {
      for (;;) {
        IncomingCall call;
        const absl::Status next = host.Next(absl::Seconds(20), &call);
        if (!next.ok()) return;
        ASSERT_LE(call.output.size(), 3u * 8 * 8);
        if (!call.output.empty()) call.output.back() = 1;
        host.Answer(call, call.valid, {});
      }
    });
    for (int i = 0; i < 200; ++i) {
      if (!client.Prepare(1, 1, 2, ValueType::kF32, ValueType::kF32).ok() || !client.Ring().ok()) break;
      const auto answer = client.Await(absl::Now() + absl::Seconds(20));
      if (!answer.ok()) break;
      if (answer->status.ok()) Sum(answer->output);
    }
    done = true;
    scribbler.join();
    host.Stop();
    server.join();
  }
}

}  // namespace
}  // namespace tandem::shm
