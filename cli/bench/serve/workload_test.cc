// Traces, the requests made of them, and what an infinite prefix cache would save.
#include "cli/bench/serve/workload.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <numeric>

#include "cli/bench/serve/prefix_ideal.h"

namespace tandem::cli {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr const char* kMooncake =
    R"({"timestamp": 0, "input_length": 1300, "output_length": 5, "hash_ids": [0, 1, 2]})"
    "\n"
    R"({"timestamp": 3000, "input_length": 1025, "output_length": 7, "hash_ids": [0, 1, 9]})"
    "\r\n\n"
    R"({"timestamp": 1500, "input_length": 600, "output_length": 2, "hash_ids": [0, 4]})"
    "\n";
constexpr const char* kAzure =
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-17 00:00:00.0000000,1,2";

TEST(Trace, Mooncake) {
  const auto trace = ParseMooncake(kMooncake, "t.jsonl");
  ASSERT_TRUE(trace.ok()) << trace.status();
  ASSERT_EQ(trace->size(), 3u);
  EXPECT_EQ((*trace)[1].seconds, 1.5);  // in the order of time
  EXPECT_EQ((*trace)[1].prompt_tokens, 600);
  EXPECT_EQ((*trace)[2].output_tokens, 7);
  EXPECT_THAT((*trace)[2].blocks, ElementsAre(0, 1, 9));
}

TEST(Trace, Azure) {
  const auto trace = ParseAzure(kAzure, "t.csv");
  ASSERT_TRUE(trace.ok()) << trace.status();
  ASSERT_EQ(trace->size(), 3u);
  EXPECT_EQ((*trace)[0].seconds, 0);
  EXPECT_NEAR((*trace)[1].seconds, 4.314579, 1e-9);
  EXPECT_NEAR((*trace)[2].seconds, 20653.31941, 1e-6);
  EXPECT_EQ((*trace)[1].prompt_tokens, 396);
  EXPECT_EQ((*trace)[1].output_tokens, 109);
}

TEST(Trace, BadLinesAreNamed) {
  const auto mooncake = [](const std::string& line) {
    return std::string(ParseMooncake(kMooncake + line, "t.jsonl").status().message());
  };
  EXPECT_THAT(mooncake("{\"timestamp\": 1"), HasSubstr("t.jsonl:5: this is no JSON object"));
  EXPECT_THAT(mooncake("[]"), HasSubstr("t.jsonl:5: "));
  EXPECT_THAT(mooncake(R"({"input_length": 1, "output_length": 1, "hash_ids": []})"),
              HasSubstr("t.jsonl:5: \"timestamp\""));
  EXPECT_THAT(mooncake(R"({"timestamp": 1, "input_length": 0, "output_length": 1, "hash_ids": []})"),
              HasSubstr("t.jsonl:5: \"input_length\""));
  EXPECT_THAT(mooncake(R"({"timestamp": 1, "input_length": 1, "output_length": 1.5, "hash_ids": []})"),
              HasSubstr("\"output_length\""));
  EXPECT_THAT(mooncake(R"({"timestamp": 1, "input_length": 1, "output_length": 1e30, "hash_ids": []})"),
              HasSubstr("\"output_length\""));
  EXPECT_THAT(mooncake(R"({"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": ["a"]})"),
              HasSubstr("\"hash_ids\""));
  const auto azure = [](const std::string& line) {
    return std::string(ParseAzure(std::string(kAzure) + "\n" + line, "t.csv").status().message());
  };
  EXPECT_THAT(azure("2023-11-16 18:15:46,1"), HasSubstr("t.csv:5: three fields"));
  EXPECT_THAT(azure("2023-11-16 18:15:46,1,2,3"), HasSubstr("t.csv:5: three fields"));
  EXPECT_THAT(azure("yesterday,1,2"), HasSubstr("t.csv:5: the first field"));
  EXPECT_THAT(azure("2023-11-16 18:15:46,0,2"), HasSubstr("t.csv:5: tokens are numbers"));
  EXPECT_THAT(azure("2023-11-16 18:15:46,1,2x"), HasSubstr("t.csv:5: tokens are numbers"));
  EXPECT_THAT(azure("2023-11-16 18:15:46,1,99999999999999999999"), HasSubstr("t.csv:5: tokens are numbers"));
  EXPECT_THAT(std::string(ParseAzure("a,b,c\n", "t.csv").status().message()),
              HasSubstr("t.csv:1: the heading"));
  EXPECT_THAT(std::string(ParseAzure("", "t.csv").status().message()), HasSubstr("the heading"));
  EXPECT_THAT(std::string(ParseMooncake("\n\n", "t.jsonl").status().message()), HasSubstr("no requests"));
}

TEST(Trace, FilesAndTheirFormats) {
  const std::string path = ::testing::TempDir() + "trace_test_file";
  std::ofstream(path) << kMooncake;
  EXPECT_EQ(ReadTrace(path, "auto")->size(), 3u);
  EXPECT_FALSE(ReadTrace(path, "azure").ok());
  std::ofstream(path) << kAzure;
  EXPECT_EQ(ReadTrace(path, "auto")->size(), 3u);
  EXPECT_THAT(std::string(ReadTrace(path, "mooncake").status().message()), HasSubstr(path + ":1: "));
  std::remove(path.c_str());
  EXPECT_EQ(ReadTrace(path, "auto").status().code(), absl::StatusCode::kNotFound);
}

std::vector<PlannedRequest> All(WorkloadOptions options, int64_t most = 1000) {
  auto workload = Workload::Create(std::move(options));
  EXPECT_TRUE(workload.ok()) << workload.status();
  std::vector<PlannedRequest> all;
  while (static_cast<int64_t>(all.size()) < most) {
    auto next = workload->Next();
    if (!next.has_value()) break;
    all.push_back(std::move(*next));
  }
  return all;
}

size_t Common(const PlannedRequest& a, const PlannedRequest& b) {
  const auto [end, other] = std::mismatch(a.prompt.begin(), a.prompt.end(), b.prompt.begin(), b.prompt.end());
  return static_cast<size_t>(end - a.prompt.begin());
}

WorkloadOptions Traced() {
  WorkloadOptions options;
  options.alphabet = 1000;
  options.trace = *ParseMooncake(kMooncake, "t");
  return options;
}

TEST(Workload, EqualBlocksAreEqualText) {
  const auto all = All(Traced());
  ASSERT_EQ(all.size(), 3u);
  EXPECT_EQ(all[0].prompt.size(), 1300u);
  EXPECT_EQ(all[1].prompt.size(), 600u);
  EXPECT_EQ(all[2].prompt.size(), 1025u);
  // Blocks 0 and 1 are common; what follows differs but for chance.
  EXPECT_GE(Common(all[0], all[2]), 1024u);
  EXPECT_LE(Common(all[0], all[2]), 1025u);
  EXPECT_GE(Common(all[0], all[1]), 512u);
  EXPECT_LE(Common(all[0], all[1]), 514u);
  EXPECT_EQ(all[2].arrival, 3.0);
  // The same seed gives the same prompts, another one others.
  EXPECT_EQ(All(Traced())[0].prompt, all[0].prompt);
  WorkloadOptions other = Traced();
  other.seed = 2;
  EXPECT_NE(All(other)[0].prompt, all[0].prompt);
}

TEST(Workload, LengthsAreScaledAndFitTheContext) {
  WorkloadOptions options = Traced();
  options.length_scale = 0.1;
  options.trace_speed = 2;
  auto all = All(options);
  EXPECT_EQ(all[0].prompt.size(), 130u);
  EXPECT_EQ(all[0].output_tokens, 1);  // 0.5, rounded
  EXPECT_EQ(all[2].arrival, 1.5);
  EXPECT_GE(Common(all[0], all[2]), 102u);  // two blocks of 51.2
  options.max_context = 100;
  all = All(options);
  EXPECT_EQ(all[0].prompt.size(), 99u);
  EXPECT_EQ(Common(all[0], all[2]), 99u);  // the end is what is cut off
  // Words of two tokens: half as many, the same bounds.
  options.tokens_per_unit = 2;
  options.overhead_tokens = 9;
  EXPECT_EQ(All(options)[0].prompt.size(), 45u);
}

TEST(Workload, SharedPrefixAndDistinctPrompts) {
  WorkloadOptions options;
  options.alphabet = 1 << 20;
  options.prompt_tokens = 50;
  options.shared_prefix = 20;
  options.distinct_prompts = 3;
  const auto all = All(options, 7);
  ASSERT_EQ(all.size(), 7u);
  EXPECT_EQ(Common(all[0], all[1]), 20u);
  EXPECT_EQ(all[0].prompt, all[3].prompt);
  EXPECT_EQ(all[0].prompt, all[6].prompt);
  EXPECT_EQ(all[1].output_tokens, 64);
  options.max_context = 100;
  EXPECT_THAT(std::string(Workload::Create(options).status().message()), HasSubstr("do not fit"));
}

TEST(Workload, ArrivalsArePoissonAndTheSameForASeed) {
  WorkloadOptions options;
  options.prompt_tokens = 1;
  options.rate = 4;
  const auto all = All(options, 4000);
  EXPECT_TRUE(std::is_sorted(all.begin(), all.end(),
                             [](const auto& a, const auto& b) { return a.arrival < b.arrival; }));
  // Mean and spread of an exponential distribution of 1/4 s: within 5 of their own standard deviations.
  std::vector<double> gaps;
  for (size_t i = 0; i < all.size(); ++i) gaps.push_back(all[i].arrival - (i == 0 ? 0 : all[i - 1].arrival));
  const double mean = std::accumulate(gaps.begin(), gaps.end(), 0.0) / static_cast<double>(gaps.size());
  double square = 0;
  for (const double gap : gaps) square += (gap - mean) * (gap - mean);
  EXPECT_NEAR(mean, 0.25, 0.02);
  EXPECT_NEAR(square / static_cast<double>(gaps.size()), 0.0625, 0.0125);
  EXPECT_EQ(All(options, 10)[9].arrival, all[9].arrival);
}

TEST(PrefixIdeal, CountsWholePagesSeenBefore) {
  PrefixIdeal ideal(4);
  const std::vector<int32_t> a = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  EXPECT_EQ(ideal.Add(a), 0);
  EXPECT_EQ(ideal.Add(a), 8);
  EXPECT_EQ(ideal.Add(std::span(a).first(8)), 4);  // its last position is computed, and so its last page
  EXPECT_EQ(ideal.Add(std::span(a).first(7)), 4);
  EXPECT_EQ(ideal.Add(std::span(a).first(3)), 0);
  const std::vector<int32_t> b = {1, 2, 3, 4, 5, 0, 7, 8, 9, 9, 9, 9};
  EXPECT_EQ(ideal.Add(b), 4);  // the third page is the same, but not what stands before it
  EXPECT_EQ(ideal.Add(b), 8);
  EXPECT_EQ(ideal.Add({}), 0);
}

// Against the definition, on random prompts of few letters.
TEST(PrefixIdeal, AgreesWithASimpleModel) {
  PrefixIdeal ideal(3);
  std::vector<std::vector<int32_t>> seen;
  for (uint64_t i = 0; i < 400; ++i) {
    std::vector<int32_t> prompt(1 + Mix(i) % 14);
    for (size_t j = 0; j < prompt.size(); ++j) prompt[j] = static_cast<int32_t>(Mix(i * 100 + j) % 2);
    int64_t best = 0;
    for (const auto& other : seen) {
      const auto end = std::mismatch(prompt.begin(), prompt.end(), other.begin(), other.end()).first;
      best = std::max<int64_t>(best, (end - prompt.begin()) / 3 * 3);
    }
    best = std::min<int64_t>(best, (static_cast<int64_t>(prompt.size()) - 1) / 3 * 3);
    EXPECT_EQ(ideal.Add(prompt), best);
    seen.push_back(prompt);
  }
}

}  // namespace
}  // namespace tandem::cli
