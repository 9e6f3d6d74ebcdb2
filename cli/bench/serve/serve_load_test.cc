// The load generator against a server whose answers are written here, and its figures.
#include "cli/bench/serve/serve_load.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <fstream>
#include <functional>
#include <mutex>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "cli/bench/serve/load_report.h"
#include "services/gateway/http/http_server.h"

namespace tandem::cli {
namespace {

using gateway::Request;
using gateway::Responder;
using nlohmann::json;
using ::testing::HasSubstr;

TEST(Latencies, AreNearestRanks) {
  std::vector<double> values;
  for (int i = 200; i >= 1; --i) values.push_back(i);
  const Latencies l = LatenciesOf(values);
  EXPECT_EQ(l.count, 200);
  EXPECT_EQ(l.p50, 100);
  EXPECT_EQ(l.p90, 180);
  EXPECT_EQ(l.p95, 190);
  EXPECT_EQ(l.p99, 198);
  EXPECT_EQ(l.max, 200);
  EXPECT_EQ(LatenciesOf({7}).p50, 7);
  EXPECT_EQ(LatenciesOf({7}).p99, 7);
  EXPECT_EQ(LatenciesOf({}).max, 0);
}

TEST(Figures, FailuresAreApartAndGoodputHasLimits) {
  LoadResults results;
  results.seconds = 2;
  const auto add = [&results](double first, double gap, const std::string& failure) {
    RequestOutcome o;
    o.first = first;
    o.end = 1;
    o.mean_gap = gap;
    o.failure = failure;
    o.detail = failure;
    o.prompt_tokens = 100;
    o.cached_tokens = 60;
    o.ideal_cached = 80;
    o.completion_tokens = 10;
    results.outcomes.push_back(o);
  };
  add(0.1, 0.01, "");
  add(0.3, 0.01, "");  // late
  add(0.1, 0.05, "");  // slow
  add(0.0, 0.00, "http 429");
  ServeLoadOptions options;
  options.concurrency = 2;
  options.slo_ttft_ms = 200;
  options.slo_itl_ms = 20;
  const LoadFigures f = FiguresOf(results, options);
  EXPECT_EQ(f.requests, 4);
  EXPECT_EQ(f.good, 3);
  EXPECT_EQ(f.failures.at("http 429"), 1);
  EXPECT_EQ(f.within_limits, 1);
  EXPECT_EQ(f.goodput, 0.5);
  EXPECT_EQ(f.prompt_tokens, 300);
  EXPECT_EQ(f.cached_tokens, 180);
  EXPECT_EQ(f.ideal_tokens, 240);
  EXPECT_EQ(f.output_rate, 15);
  EXPECT_FALSE(AllWell(f, results));
  const std::string table = LoadTable(f, results, options);
  EXPECT_THAT(table, HasSubstr("cached 180 (60.0 %)"));
  EXPECT_THAT(table, HasSubstr("http 429"));
  std::istringstream lines(LoadJson(f, results, options, "a machine"));
  std::string line;
  ASSERT_TRUE(std::getline(lines, line));
  const json summary = json::parse(line);
  EXPECT_EQ(summary["bench"], "serve");
  EXPECT_EQ(summary["failures"]["http 429"], 1);
  EXPECT_EQ(summary["tokens_per_second"], 15.0);
  ASSERT_TRUE(std::getline(lines, line));
  const json first = json::parse(line);
  EXPECT_EQ(first["what"], "time to first token");
  EXPECT_NEAR(first["p99_us"].get<double>(), 300000, 1e-6);
}

std::string Event(const json& data) { return "data: " + data.dump() + "\n\n"; }
std::string Piece(const std::string& text, const char* finish = nullptr) {
  json choice = json::object({{"index", 0}, {"text", text}, {"finish_reason", nullptr}});
  if (finish != nullptr) choice["finish_reason"] = finish;
  return Event(json::object({{"id", "x"}, {"choices", json::array({choice})}}));
}

class LoadTest : public ::testing::Test {
 protected:
  using Script = std::function<void(const json& request, Responder responder)>;

  void SetUp() override {
    options_.requests = 6;
    options_.concurrency = 2;
    options_.output_tokens = 3;
    options_.prompt_tokens = 40;
  }
  void Serve(Script script) {
    script_ = std::move(script);
    gateway::HttpServerOptions options;
    options.listen = "127.0.0.1:0";
    auto server = gateway::HttpServer::Start(
        options, [this](Request request, Responder responder) { Handle(request, std::move(responder)); });
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = std::move(*server);
    options_.url = "http://127.0.0.1:" + std::to_string(server_->port());
  }
  void Handle(const Request& request, Responder responder) {
    const auto reply = [&](const json& body) { responder.Respond(200, "application/json", body.dump()); };
    if (request.Path() == "/v1/models")
      return reply(json::parse(R"({"data":[{"id":"m","max_model_len":4096}]})"));
    if (request.Path() == "/health") {
      ++health_;
      return reply(json::object({{"status", "ok"}}));
    }
    if (request.Path() == "/tokenize" && tokenize_) {
      return reply(json::parse(R"({"tokens":[5,6,7,8,9,5]})"));
    }
    const json body = json::parse(request.body, nullptr, false);
    if (request.Path() != "/v1/completions") return responder.Respond(404, "text/plain", "no");
    if (!body.contains("stream")) {  // the question how many tokens words have
      std::istringstream words(body["prompt"].get<std::string>());
      const auto count = std::distance(std::istream_iterator<std::string>(words), {});
      return reply(json::parse("{\"usage\":{\"prompt_tokens\":" + std::to_string(2 * count + 7) + "}}"));
    }
    script_(body, std::move(responder));
  }
  // A good answer whose text follows from the prompt.
  static void Answer(const json& request, Responder& responder, const std::string& text = "") {
    const int64_t tokens = request["max_tokens"];
    const auto prompt = static_cast<int64_t>(request["prompt"].is_array() ? request["prompt"].size() : 40);
    responder.StartStream(200, "text/event-stream");
    for (int64_t i = 0; i < tokens; ++i) {
      const std::string piece =
          text.empty() ? request["prompt"].dump().substr(static_cast<size_t>(i), 1) : text;
      responder.Write(Piece(piece));
    }
    responder.Write(Piece("", "length"));
    json usage = json::object({{"prompt_tokens", prompt}, {"completion_tokens", tokens}});
    usage["prompt_tokens_details"]["cached_tokens"] = prompt / 2;
    responder.Write(Event(json::object({{"id", "x"}, {"choices", json::array()}, {"usage", usage}})));
    responder.Write("data: [DONE]\n\n");
    responder.Finish();
  }
  absl::Status Run(bool as_json = true) {
    std::ostringstream out;
    Report report(as_json, out);
    const absl::Status status = BenchServe(options_, report);
    server_->Shutdown(absl::Seconds(5));
    text_ = out.str();
    std::ifstream log(options_.log);
    log_.assign(std::istreambuf_iterator<char>(log), {});
    if (!options_.log.empty()) std::remove(options_.log.c_str());
    summary_ = json::parse(text_.substr(0, text_.find('\n')), nullptr, false);
    return status;
  }

  ServeLoadOptions options_;
  Script script_;
  bool tokenize_ = true;
  std::atomic<int> health_{0};
  std::unique_ptr<gateway::HttpServer> server_;
  std::string text_, log_;
  json summary_;
};

TEST_F(LoadTest, ClosedLoop) {
  std::mutex mutex;
  std::vector<json> requests;
  Serve([&](const json& request, Responder responder) {
    const std::lock_guard lock(mutex);
    requests.push_back(request);
    Answer(request, responder);
  });
  options_.log = ::testing::TempDir() + "serve_load_test.jsonl";
  ASSERT_TRUE(Run().ok()) << text_;
  EXPECT_EQ(summary_["good"], 6);
  EXPECT_EQ(summary_["most_under_way"], 2);
  EXPECT_LE(summary_["connections"], 2);  // kept alive
  EXPECT_EQ(summary_["prompt_tokens"], 240);
  EXPECT_EQ(summary_["output_tokens"], 18);
  EXPECT_EQ(summary_["cached_tokens"], 120);
  ASSERT_EQ(requests.size(), 6u);
  EXPECT_EQ(requests[0]["prompt"].size(), 40u);
  EXPECT_EQ(requests[0]["temperature"], 0);
  EXPECT_EQ(requests[0]["ignore_eos"], true);
  EXPECT_EQ(requests[0]["model"], "m");
  EXPECT_NE(requests[0]["prompt"], requests[1]["prompt"]);
  EXPECT_EQ(std::count(log_.begin(), log_.end(), '\n'), 6);
}

// Nobody is answered before all are there: a generator that waited for answers would stand still.
TEST_F(LoadTest, AnOpenLoopDoesNotWaitForAnswers) {
  constexpr size_t kAll = 40;
  std::mutex mutex;
  std::vector<std::pair<json, Responder>> waiting;
  Serve([&](const json& request, Responder responder) {
    const std::lock_guard lock(mutex);
    waiting.emplace_back(request, std::move(responder));
    if (waiting.size() < kAll) return;
    for (auto& [body, open] : waiting) Answer(body, open);
    waiting.clear();
  });
  options_.concurrency = 0;
  options_.rate = 1000;
  options_.requests = kAll;
  ASSERT_TRUE(Run().ok()) << text_;
  EXPECT_EQ(summary_["good"], kAll);
  EXPECT_EQ(summary_["most_under_way"], kAll);
}

TEST_F(LoadTest, ATraceEndsByItself) {
  const std::string path = ::testing::TempDir() + "serve_load_test_trace.jsonl";
  {
    std::ofstream trace(path);
    for (int i = 0; i < 5; ++i) {
      trace << json{{"timestamp", 10 * i},
                    {"input_length", 1100},
                    {"output_length", 20},
                    {"hash_ids", {0, 1, 10 + i}}}
            << "\n";
    }
  }
  Serve([](const json& request, Responder responder) { Answer(request, responder); });
  options_.concurrency = 0;
  options_.requests = 0;
  options_.trace = path;
  options_.length_scale = 0.5;
  options_.page_tokens = 16;
  ASSERT_TRUE(Run().ok()) << text_;
  EXPECT_EQ(summary_["good"], 5);
  EXPECT_EQ(summary_["prompt_tokens"], 5 * 550);
  EXPECT_EQ(summary_["ideal_cached_tokens"], 4 * 512);
  EXPECT_EQ(summary_["output_tokens"], 50);
  std::remove(path.c_str());
}

TEST_F(LoadTest, WordsAreUsedWhereTokensCannotBe) {
  tokenize_ = false;
  std::string prompt;
  Serve([&](const json& request, Responder responder) {
    prompt = request["prompt"];
    Answer(request, responder);
  });
  options_.concurrency = 1;
  options_.requests = 1;
  options_.prompt_tokens = 107;
  ASSERT_TRUE(Run().ok()) << text_;
  EXPECT_EQ(std::count(prompt.begin(), prompt.end(), ' '), 49);  // 7 + 2 for each of 50 words
}

TEST_F(LoadTest, FailuresAreCountedByTheirKind) {
  std::atomic<int> count{0};
  std::thread dropper;
  Serve([&](const json& request, Responder responder) {
    switch (count++) {
      case 0:
        return responder.Respond(429, "application/json", R"({"error":{"message":"too many"}})");
      case 1:
        responder.StartStream(200, "text/event-stream");
        responder.Write(Piece("a"));
        // Dropped when that is on its way: the connection breaks off.
        dropper = std::thread([open = std::make_unique<Responder>(std::move(responder))] {
          while (open->unsent_bytes() > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        });
        return;
      case 2:
        return responder.Respond(200, "application/json", "{}");
      case 3:
        responder.StartStream(200, "text/event-stream");
        responder.Write("data: {\"error\":{\"message\":\"it broke\"}}\n\ndata: [DONE]\n\n");
        return responder.Finish();
      default:
        Answer(request, responder);
    }
  });
  options_.concurrency = 1;
  options_.log = ::testing::TempDir() + "serve_load_test_failures.jsonl";
  EXPECT_EQ(Run().code(), absl::StatusCode::kDataLoss);
  dropper.join();
  EXPECT_EQ(summary_["good"], 2);
  const json expected = {{"http 429", 1}, {"cut off", 1}, {"malformed stream", 1}, {"error event", 1}};
  EXPECT_EQ(summary_["failures"], expected) << log_;
}

TEST_F(LoadTest, DifferingAnswersAreNoticed) {
  std::atomic<int> count{0};
  Serve([&](const json& request, Responder responder) {
    Answer(request, responder, count++ == 0 ? "first" : "other");
  });
  options_.concurrency = 1;
  options_.distinct_prompts = 2;  // asked as 0 1 0 1 0 1
  options_.verify = 6;
  EXPECT_EQ(Run().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(summary_["repeated"], 4);
  EXPECT_EQ(summary_["repeated_differing"], 2);
  EXPECT_EQ(summary_["asked_again"], 6);
  EXPECT_EQ(summary_["asked_again_differing"], 1);
}

TEST_F(LoadTest, EqualAnswersAreFine) {
  Serve([](const json& request, Responder responder) { Answer(request, responder); });
  options_.distinct_prompts = 2;
  options_.verify = 3;
  ASSERT_TRUE(Run(/*as_json=*/false).ok()) << text_;
  EXPECT_THAT(text_, HasSubstr("4 repeated prompts, 0 differ; 3 asked again alone, 0 differ"));
}

TEST_F(LoadTest, IdleConnectionsAreHeldBesideTheLoad) {
  Serve([](const json& request, Responder responder) { Answer(request, responder); });
  options_.idle_connections = 300;
  ASSERT_TRUE(Run().ok()) << text_;
  EXPECT_EQ(summary_["idle_open"], 300);
  EXPECT_EQ(summary_["idle_refused"], 0);
  EXPECT_EQ(summary_["idle_dropped"], 0);
  EXPECT_EQ(health_.load(), 300);
}

TEST_F(LoadTest, BadOptionsAndAbsentServers) {
  Serve([](const json& request, Responder responder) { Answer(request, responder); });
  std::ostringstream out;
  Report report(true, out);
  const auto fails = [&](ServeLoadOptions options, absl::StatusCode code, const char* message) {
    const absl::Status status = BenchServe(options, report);
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  };
  ServeLoadOptions bad = options_;
  bad.rate = 1;
  fails(bad, absl::StatusCode::kInvalidArgument, "exclude each other");
  bad = options_;
  bad.concurrency = 0;
  fails(bad, absl::StatusCode::kInvalidArgument, "one of --concurrency");
  bad = options_;
  bad.requests = 0;
  fails(bad, absl::StatusCode::kInvalidArgument, "--requests or --duration");
  bad = options_;
  bad.prompt_tokens = 5000;
  fails(bad, absl::StatusCode::kInvalidArgument, "do not fit the context of 4096");
  bad = options_;
  bad.trace = "/nowhere/trace";
  fails(bad, absl::StatusCode::kNotFound, "/nowhere/trace");
  bad = options_;
  bad.api = "chat";
  bad.prompts = "tokens";
  fails(bad, absl::StatusCode::kInvalidArgument, "text alone");
  server_->Shutdown(absl::Seconds(5));
  fails(options_, absl::StatusCode::kUnavailable, options_.url.c_str());
}

}  // namespace
}  // namespace tandem::cli
