// Which processes go together: shards of the experts, precisions, models.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/integration/bad_models.h"
#include "tests/integration/stack.h"

namespace tandem::integration {
namespace {

using ::testing::HasSubstr;

Json LogprobRequest() {
  Json request = Question("What is 5931 + 2287?");
  request["logprobs"] = true;
  request["top_logprobs"] = 5;
  return request;
}

TEST(PairingTest, TwoExpertProcessesAnswerAsOne) {
  struct Arrangement {
    std::vector<std::vector<std::string>> experts;
    std::string transport;
  };
  const std::vector<Arrangement> arrangements = {
      {{{}}, "ring"},
      {{{}}, "grpc"},
      {{{"--experts", "0-8"}, {"--experts", "8-16"}}, "ring"},
      {{{"--experts", "5-16"}, {"--experts", "0-5"}}, "grpc"},
      {{{"--experts", "0-1", "--ring", "off"}, {"--experts", "1-16"}}, "auto"},
  };
  std::vector<Answer> answers;
  for (const Arrangement& arrangement : arrangements) {
    StackOptions options;
    options.experts = arrangement.experts;
    options.attention = {"--expert-transport", arrangement.transport};
    Stack stack(options);
    ASSERT_TRUE(stack.WaitReady());
    answers.push_back(stack.rest().Ask(LogprobRequest()));
    ASSERT_TRUE(answers.back().ok()) << answers.back().ToString() << stack.Logs();
    ASSERT_GT(answers.back().logprobs.size(), 50u);
    for (size_t i = 0; i < arrangement.experts.size(); ++i) {
      EXPECT_GT(stack.expert_metrics(i).Metric("tandem_expert_calls_total"), 0) << "process " << i;
    }
  }
  EXPECT_THAT(answers[0].content, HasSubstr("8218"));
  for (const Answer& answer : answers) {
    EXPECT_EQ(answer.reasoning, answers[0].reasoning);
    EXPECT_EQ(answer.content, answers[0].content);
    EXPECT_EQ(answer.logprobs, answers[0].logprobs);  // every digit of them
  }
}

TEST(PairingTest, ReferencePrecision) {
  StackOptions options;
  options.experts = {{"--precision", "reference"}};
  options.attention = {"--precision", "reference"};
  Stack stack(options);
  ASSERT_TRUE(stack.WaitReady());
  const Answer answer = stack.rest().Ask(Question("What is 12 + 34?"));
  EXPECT_EQ(answer.content, "12 + 34 = 46.") << answer.ToString();
}

// Attention started beside experts that do not fit: ends with 1 and says why.
class Refusal {
 public:
  explicit Refusal(const StackOptions& options) : stack_(options) {
    code_ = stack_.attention().Wait();
    log_ = stack_.attention().Output();
    // What the client of the gateway sees meanwhile: not ready, and no hang.
    stack_.gateway().WaitForOutput("HTTP on");
    ready_ = stack_.rest().Get("/ready").status;
    health_ = stack_.rest().Get("/health").status;
  }
  void Expect(const std::vector<std::string>& words) const {
    EXPECT_EQ(code_, 1) << log_;
    for (const std::string& word : words) EXPECT_THAT(log_, HasSubstr(word));
    EXPECT_EQ(ready_, 503);
    EXPECT_EQ(health_, 200);
  }
  std::string expert_address() const { return stack_.expert_address(); }

 private:
  Stack stack_;
  std::optional<int> code_;
  std::string log_;
  int ready_ = 0, health_ = 0;
};

TEST(PairingTest, AnotherPrecisionIsRefused) {
  StackOptions options;
  options.experts = {{"--precision", "reference"}};
  const Refusal refusal(options);
  refusal.Expect({refusal.expert_address(), "--precision reference"});
}

TEST(PairingTest, AnotherModelIsRefused) {
  // The same weights under another name are another model.
  const TempFolder folder;
  const std::string other = folder / "other.gguf";
  WriteRenamedModel(other);
  StackOptions options;
  options.expert_model = other;
  const Refusal refusal(options);
  refusal.Expect({refusal.expert_address(), "holds another model (Other"});
}

TEST(PairingTest, MissingAndDoubledExpertsAreNamed) {
  {
    StackOptions options;
    options.experts = {{"--experts", "0-8"}};
    Refusal(options).Expect({"hold 50 % of the experts"});
  }
  {
    StackOptions options;
    options.experts = {{"--experts", "0-9"}, {"--experts", "8-16"}};
    Refusal(options).Expect({"both hold experts [8, 9)"});
  }
}

TEST(PairingTest, NoExpertsAtAll) {
  const TempFolder folder;
  Process attention("tandem-attention",
                    {"--model", DemoModel(), "--listen", "unix:" + (folder / "a"), "--metrics-listen", ""});
  EXPECT_EQ(attention.Wait(), 1) << attention.Output();
  EXPECT_THAT(attention.Output(), HasSubstr("--expert"));
}

}  // namespace
}  // namespace tandem::integration
