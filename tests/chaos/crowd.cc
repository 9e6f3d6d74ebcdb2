#include "tests/chaos/crowd.h"

#include <atomic>
#include <condition_variable>
#include <future>
#include <mutex>

namespace tandem::integration {
namespace {

constexpr int kEventsBefore = 5;

}  // namespace

std::vector<Json> CrowdRequests(int tokens) {
  std::vector<Json> requests;
  for (int i = 0; i < kCrowd; ++i) {
    Json request =
        Question("What is " + std::to_string(100 + 37 * i) + " + " + std::to_string(500 - 11 * i) + "?");
    request["ignore_eos"] = true;
    request["max_tokens"] = tokens;
    if (i % 2 == 1) {
      request["temperature"] = 1.2;
      request["seed"] = 1000 + i;
    }
    requests.push_back(std::move(request));
  }
  return requests;
}

std::vector<Answer> AskAlone(const RestClient& rest, const std::vector<Json>& requests) {
  std::vector<Answer> answers;
  for (const Json& request : requests) {
    answers.push_back(rest.Stream(request));
    EXPECT_TRUE(answers.back().ok()) << answers.back().ToString();
  }
  return answers;
}

std::vector<Answer> AskTogether(const RestClient& rest, const std::vector<Json>& requests,
                                const std::function<void()>& strike) {
  std::mutex mutex;
  std::condition_variable changed;
  int begun = 0, ended = 0;
  std::vector<std::future<Answer>> streams;
  for (const Json& request : requests) {
    streams.push_back(std::async(std::launch::async, [&, request] {
      Answer answer = rest.Stream(request, [&](int events) {
        if (events == kEventsBefore) {
          const std::lock_guard lock(mutex);
          ++begun;
          changed.notify_all();
        }
        return true;
      });
      const std::lock_guard lock(mutex);
      ++ended;
      changed.notify_all();
      return answer;
    }));
  }
  {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return begun == static_cast<int>(requests.size()) || ended > 0; });
    EXPECT_EQ(ended, 0) << "one was done before all had begun: the strike does not fall in their midst";
  }
  if (strike) strike();
  std::vector<Answer> answers;
  for (auto& stream : streams) answers.push_back(stream.get());
  return answers;
}

void ExpectSame(const std::vector<Answer>& got, const std::vector<Answer>& alone) {
  ASSERT_EQ(got.size(), alone.size());
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_TRUE(got[i].ok() && got[i].done) << "stream " << i << ": " << got[i].ToString();
    EXPECT_EQ(got[i].reasoning, alone[i].reasoning) << "stream " << i;
    EXPECT_EQ(got[i].content, alone[i].content) << "stream " << i;
    EXPECT_EQ(got[i].finish, alone[i].finish) << "stream " << i;
    EXPECT_EQ(got[i].usage["completion_tokens"], alone[i].usage["completion_tokens"]) << "stream " << i;
  }
}

::testing::AssertionResult WaitIdle(Stack& stack) {
  const RestClient rest = stack.rest(), attention = stack.attention_metrics();
  const bool idle = WaitUntil([&] {
    return rest.Metric("tandem_requests_running") == 0 && rest.Metric("tandem_requests_waiting") == 0 &&
           attention.Metric("tandem_requests_running") == 0 &&
           attention.Metric("tandem_requests_waiting") == 0 &&
           attention.Metric("tandem_kv_cache_used_ratio") == 0;
  });
  if (idle) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure()
         << "gateway running " << rest.Metric("tandem_requests_running") << ", waiting "
         << rest.Metric("tandem_requests_waiting") << "; engine running "
         << attention.Metric("tandem_requests_running") << ", waiting "
         << attention.Metric("tandem_requests_waiting") << ", KV cache used "
         << attention.Metric("tandem_kv_cache_used_ratio");
}

}  // namespace tandem::integration
