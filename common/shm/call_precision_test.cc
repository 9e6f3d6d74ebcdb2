// A call's precision on its way.
#include <gtest/gtest.h>

#include "absl/time/clock.h"
#include "common/shm/call_client.h"
#include "common/shm/call_host.h"
#include "common/shm/memory.h"

namespace tandem::shm {
namespace {

TEST(CallPrecisionTest, ArrivesAndIsNotKept) {
  const SessionId session{77, 1};
  const RegionLayout layout = *RegionLayout::Of({2, 16, 4, 32});
  const SharedMemory memory = *SharedMemory::Create("precision-test", layout.region_bytes());
  CallHost host(memory.data(), layout, session, {});
  CallClient client(memory.data(), layout, session, {});
  const auto exchange = [&](CallPrecision precision) {
    EXPECT_TRUE(client.Prepare(1, 1, 2, ValueType::kF32, ValueType::kF32, precision).ok());
    EXPECT_TRUE(client.Ring().ok());
    IncomingCall call;
    EXPECT_TRUE(host.Next(absl::Seconds(10), &call).ok());
    EXPECT_TRUE(call.valid.ok()) << call.valid;
    host.Answer(call, call.valid, {});
    EXPECT_TRUE(client.Await(absl::Now() + absl::Seconds(10)).ok());
    return call.precision;
  };
  EXPECT_EQ(exchange(CallPrecision::kBulk), CallPrecision::kBulk);
  EXPECT_EQ(exchange(CallPrecision::kServed), CallPrecision::kServed);
  EXPECT_EQ(exchange(CallPrecision::kBulk), CallPrecision::kBulk);
  EXPECT_EQ(exchange(CallPrecision::kBulk), CallPrecision::kBulk);
}

}  // namespace
}  // namespace tandem::shm
