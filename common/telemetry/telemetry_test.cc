#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>

#include "common/telemetry/log.h"
#include "common/telemetry/metrics.h"

namespace tandem::telemetry {
namespace {

using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::Not;

// GET /path, the whole answer.
std::string HttpGet(int port, const std::string& path) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(static_cast<uint16_t>(port));
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to) != 0) {
    close(fd);
    return "connection refused";
  }
  const std::string request = "GET " + path + " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
  EXPECT_EQ(write(fd, request.data(), request.size()), static_cast<ssize_t>(request.size()));
  std::string answer;
  char buffer[4096];
  for (ssize_t n; (n = read(fd, buffer, sizeof buffer)) > 0;) answer.append(buffer, static_cast<size_t>(n));
  close(fd);
  return answer;
}

std::string Body(const std::string& answer) {
  const size_t at = answer.find("\r\n\r\n");
  return at == std::string::npos ? "" : answer.substr(at + 4);
}

void AddAll(Metrics& metrics) {
  metrics.AddCounter("tandem_calls_total", "Calls by outcome.", {{"outcome", "ok"}}).Add();
  metrics.AddCounter("tandem_calls_total", "Calls by outcome.", {{"outcome", "error"}}).Add(2);
  metrics.AddGauge("tandem_resident_bytes", "Bytes of weights in memory.").Set(1234);
  Histogram& histogram =
      metrics.AddHistogram("tandem_call_seconds", "Duration of calls.", MicrosecondBuckets());
  histogram.Observe(0.5e-6);
  histogram.Observe(0.3);
  histogram.Observe(7);
}

TEST(MetricsTest, ExposesEverySeries) {
  Metrics metrics("expert");
  AddAll(metrics);
  const std::string text = metrics.Expose();
  EXPECT_THAT(text,
              HasSubstr("# HELP tandem_calls_total Calls by outcome.\n# TYPE tandem_calls_total counter"));
  EXPECT_THAT(text, HasSubstr("tandem_calls_total{service=\"expert\",outcome=\"ok\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("tandem_calls_total{service=\"expert\",outcome=\"error\"} 2\n"));
  EXPECT_THAT(text, HasSubstr("tandem_resident_bytes{service=\"expert\"} 1234\n"));
  EXPECT_THAT(text, HasSubstr("tandem_call_seconds_count{service=\"expert\"} 3\n"));
  EXPECT_THAT(text, HasSubstr("tandem_call_seconds_bucket{service=\"expert\",le=\"1e-06\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("tandem_build_info{service=\"expert\",version=\"" TANDEM_VERSION "\"} 1\n"));
}

TEST(MetricsTest, SameNameAndLabelsAreOneObject) {
  Metrics metrics("expert");
  Counter& a = metrics.AddCounter("tandem_a_total", "A.", {{"x", "1"}});
  Counter& b = metrics.AddCounter("tandem_a_total", "A.", {{"x", "2"}});
  EXPECT_EQ(&a, &metrics.AddCounter("tandem_a_total", "A.", {{"x", "1"}}));
  EXPECT_NE(&a, &b);
}

TEST(MetricsTest, CountsFromManyThreads) {
  Metrics metrics("expert");
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 1000; ++i) metrics.AddCounter("tandem_a_total", "A.").Add();
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(metrics.Expose(), HasSubstr("tandem_a_total{service=\"expert\"} 4000\n"));
}

TEST(MetricsTest, BucketsRise) {
  for (const auto& buckets : {MicrosecondBuckets(), RequestBuckets()}) {
    for (size_t i = 1; i < buckets.size(); ++i) EXPECT_LT(buckets[i - 1], buckets[i]);
  }
  EXPECT_DOUBLE_EQ(MicrosecondBuckets().front(), 1e-6);
  EXPECT_NEAR(MicrosecondBuckets().back(), 1, 1e-9);
  EXPECT_DOUBLE_EQ(RequestBuckets().front(), 1e-3);
  EXPECT_DOUBLE_EQ(RequestBuckets().back(), 600);
}

TEST(MetricsTest, ScrapedOverHttp) {
  int port = 0;
  {
    Metrics metrics("gateway");
    AddAll(metrics);
    const auto served = metrics.Serve("127.0.0.1:0");
    ASSERT_TRUE(served.ok()) << served.status();
    port = *served;
    EXPECT_GT(port, 0);
    const std::string answer = HttpGet(port, "/metrics");
    EXPECT_THAT(answer, HasSubstr("HTTP/1.1 200"));
    EXPECT_THAT(answer, HasSubstr("tandem_calls_total{service=\"gateway\",outcome=\"error\"} 2"));
    EXPECT_THAT(HttpGet(port, "/etc/passwd"), HasSubstr("HTTP/1.1 404"));
    EXPECT_EQ(metrics.Serve("127.0.0.1:0").status().code(), absl::StatusCode::kFailedPrecondition);
  }
  EXPECT_EQ(HttpGet(port, "/metrics"), "connection refused");
}

TEST(MetricsTest, PortInUseNamesTheAddress) {
  Metrics first("a");
  const auto port = first.Serve("localhost:0");
  ASSERT_TRUE(port.ok()) << port.status();
  Metrics second("b");
  const std::string address = "localhost:" + std::to_string(*port);
  const auto refused = second.Serve(address);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr(address));
}

TEST(MetricsTest, BadAddresses) {
  Metrics metrics("a");
  for (const char* address : {"9090", "127.0.0.1:", "127.0.0.1:99999", ":80", "127.0.0.1:x", "::1:80"}) {
    const auto refused = metrics.Serve(address);
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument) << address;
    EXPECT_THAT(std::string(refused.status().message()), HasSubstr(address));
  }
  EXPECT_EQ(metrics.Serve("192.0.2.1:0").status().code(), absl::StatusCode::kNotFound);
}

TEST(MetricsTest, PromtoolAcceptsWhatIsScraped) {
  if (std::system("command -v promtool >/dev/null 2>&1") != 0) GTEST_SKIP() << "promtool is not installed";
  Metrics metrics("gateway");
  AddAll(metrics);
  const auto port = metrics.Serve("127.0.0.1:0");
  ASSERT_TRUE(port.ok()) << port.status();
  HttpGet(*port, "/metrics");
  const std::string path = ::testing::TempDir() + "/tandem_metrics_" + std::to_string(getpid());
  std::ofstream(path) << Body(HttpGet(*port, "/metrics"));
  EXPECT_EQ(std::system(("promtool check metrics < " + path + " >&2").c_str()), 0);
  // The check itself can fail: a counter under a wrong name.
  std::ofstream(path) << "# TYPE tandem_calls counter\ntandem_calls 1\n";
  EXPECT_NE(std::system(("promtool check metrics < " + path + " 2>/dev/null").c_str()), 0);
  std::remove(path.c_str());
}

std::string Captured(const char* level) {
  if (level != nullptr) {
    setenv("TANDEM_LOG", level, 1);
  } else {
    unsetenv("TANDEM_LOG");
  }
  ::testing::internal::CaptureStderr();
  InitLog("attention");
  spdlog::debug("fine grain");
  spdlog::info("first\nsecond {}", 2);
  unsetenv("TANDEM_LOG");
  return ::testing::internal::GetCapturedStderr();
}

TEST(LogTest, OneLineAnEvent) {
  EXPECT_THAT(Captured(nullptr),
              MatchesRegex("[0-9]+-[0-9]+-[0-9]+ [0-9:]+\\.[0-9]+ I attention: first\\\\nsecond 2\n"));
}

TEST(LogTest, LevelsFromTheEnvironment) {
  EXPECT_THAT(Captured("debug"), HasSubstr("D attention: fine grain"));
  EXPECT_EQ(Captured("error"), "");
  const std::string unknown = Captured("loud");
  EXPECT_THAT(unknown, HasSubstr("W attention: TANDEM_LOG=loud"));
  EXPECT_THAT(unknown, HasSubstr("I attention: first"));
  EXPECT_THAT(unknown, Not(HasSubstr("fine grain")));
}

}  // namespace
}  // namespace tandem::telemetry
