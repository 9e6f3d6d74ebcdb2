#include "services/gateway/session/work_queue.h"

#include <gtest/gtest.h>

#include <future>
#include <string>

namespace tandem::gateway {
namespace {

constexpr size_t kLarge = WorkQueue::kLargeInput + 1;

// However many large ones there are, a small one does not wait for them.
TEST(WorkQueue, LargeTasksLeaveAThreadToTheOthers) {
  WorkQueue queue(2, 100);
  std::promise<void> go;
  std::shared_future<void> gone(go.get_future());
  std::promise<void> first_runs, small_ran;
  int large = 0;
  ASSERT_TRUE(queue.TryPush(kLarge, [&] { first_runs.set_value(), gone.wait(), ++large; }));
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(queue.TryPush(kLarge, [&] { gone.wait(), ++large; }));
  first_runs.get_future().wait();
  ASSERT_TRUE(queue.TryPush(1, [&] { small_ran.set_value(); }));
  small_ran.get_future().wait();  // hangs otherwise
  EXPECT_EQ(large, 0);
  go.set_value();
  std::promise<void> all;
  ASSERT_TRUE(queue.TryPush(kLarge, [&] { all.set_value(); }));
  all.get_future().wait();
  EXPECT_EQ(large, 4);  // one at a time
}

TEST(WorkQueue, OneThreadTakesThemInTheirOrder) {
  std::string order;
  {
    WorkQueue queue(1, 100);
    for (const auto& [bytes, name] :
         {std::pair(kLarge, 'a'), std::pair(size_t{1}, 'b'), std::pair(kLarge, 'c')}) {
      ASSERT_TRUE(queue.TryPush(bytes, [&order, name = name] { order += name; }));
    }
  }  // runs what was accepted
  EXPECT_EQ(order, "abc");
}

TEST(WorkQueue, RefusesWhatIsTooMuch) {
  WorkQueue queue(1, 2);
  std::promise<void> go, runs;
  std::shared_future<void> gone(go.get_future());
  ASSERT_TRUE(queue.TryPush(1, [&] { runs.set_value(), gone.wait(); }));
  runs.get_future().wait();
  EXPECT_TRUE(queue.TryPush(1, [] {}));
  EXPECT_TRUE(queue.TryPush(kLarge, [] {}));
  EXPECT_FALSE(queue.TryPush(1, [] {}));
  go.set_value();
}

}  // namespace
}  // namespace tandem::gateway
