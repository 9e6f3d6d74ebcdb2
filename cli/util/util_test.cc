#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "cli/serve/ports.h"
#include "cli/util/format.h"
#include "cli/util/http_client.h"
#include "cli/util/nearest.h"
#include "cli/util/sse.h"

namespace tandem::cli {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(Nearest, CountsEdits) {
  EXPECT_EQ(EditDistance("port", "port"), 0);
  EXPECT_EQ(EditDistance("prot", "port"), 1);  // a swap
  EXPECT_EQ(EditDistance("", "abc"), 3);
  EXPECT_EQ(EditDistance("kitten", "sitting"), 3);
}

TEST(Nearest, FindsWhatWasMeant) {
  const std::vector<std::string> flags = {"--port", "--model", "--grpc-port", "--max-batch-size"};
  EXPECT_EQ(Nearest("--prot", flags), "--port");
  EXPECT_EQ(Nearest("--max_batch", flags), "--max-batch-size");
  EXPECT_EQ(Nearest("--MODEL", flags), "--model");
  EXPECT_EQ(Nearest("--completely-different", flags), "");
  EXPECT_EQ(Nearest("", flags), "");
  EXPECT_EQ(Nearest(std::string(100'000, 'x'), flags), "");
}

TEST(Format, Numbers) {
  EXPECT_EQ(FormatBytes(512), "512 B");
  EXPECT_EQ(FormatBytes(13'146'784), "13.1 MB");
  EXPECT_EQ(FormatBytes(999'999'999), "1.0 GB");
  EXPECT_EQ(FormatCount(671'026'419'200), "671.0 B");
  EXPECT_EQ(Grouped(0), "0");
  EXPECT_EQ(Grouped(163840), "163,840");
  EXPECT_EQ(Grouped(1'000'000), "1,000,000");
}

TEST(Format, PrintableTakesControlOut) {
  EXPECT_EQ(Printable("plain \xC3\xA9 \xE4\xBD\xA0"), "plain \xC3\xA9 \xE4\xBD\xA0");
  EXPECT_EQ(Printable("\x1B[31mred"), "\\x1B[31mred");
  EXPECT_EQ(Printable("a\nb\tc"), "a\\nb\\tc");
  EXPECT_EQ(Printable("\xC2\x9B"), "\\xC2\\x9B");           // a C1 control character
  EXPECT_EQ(Printable("\xFFx\xC3"), "\\xFFx\\xC3");         // broken and cut UTF-8
  EXPECT_EQ(Printable("\xED\xA0\x80"), "\\xED\\xA0\\x80");  // a surrogate
}

TEST(Url, Parses) {
  const auto url = ParseUrl("http://127.0.0.1:10002/");
  ASSERT_TRUE(url.ok());
  EXPECT_EQ(url->host, "127.0.0.1");
  EXPECT_EQ(url->port, "10002");
  EXPECT_EQ(url->path, "");
  EXPECT_EQ(ParseUrl("localhost")->port, "80");
  EXPECT_EQ(ParseUrl("host:1/a/b/")->path, "/a/b");
  EXPECT_EQ(ParseUrl("http://[::1]:8080")->host, "::1");
  EXPECT_EQ(ParseUrl("http://[::1]:8080")->ToString(), "http://[::1]:8080");
}

TEST(Url, Refuses) {
  for (const char* bad :
       {"https://x", "", "http://", "http://h:0", "http://h:65536", "http://h:x", "http://h:", "::1",
        "http://[::1", "http://[::1]x", "http://a b", "http://h:99999999999"}) {
    EXPECT_EQ(ParseUrl(bad).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

TEST(Url, OfAnApiMayEndWithItsVersion) {
  for (const char* text : {"http://h:1/v1", "http://h:1/v1/", "http://h:1/", "h:1"}) {
    EXPECT_EQ(ParseApiUrl(text)->path, "") << text;
  }
  EXPECT_EQ(ParseApiUrl("http://h:1/proxy/v1")->path, "/proxy");
  EXPECT_EQ(ParseApiUrl("http://h:1/av1")->path, "/av1");
  EXPECT_FALSE(ParseApiUrl("https://h/v1").ok());
}

TEST(Sse, PiecesMayBeCutAnywhere) {
  const std::string stream =
      ": a comment\r\n\r\ndata: {\"a\":1}\n\ndata:x\r\ndata: y\r\n\r\nevent: z\nid: 3\n\ndata\n\ndata: "
      "[DONE]\n\n";
  for (size_t size = 1; size <= stream.size(); ++size) {
    std::vector<std::string> events;
    SseReader reader([&](const std::string& data) { events.push_back(data); });
    for (size_t i = 0; i < stream.size(); i += size) reader.Feed(std::string_view(stream).substr(i, size));
    EXPECT_THAT(events, ElementsAre("{\"a\":1}", "x\ny", "", "[DONE]")) << size;
  }
}

TEST(Sse, AnEventWithoutItsEmptyLineIsNotDelivered) {
  int events = 0;
  SseReader reader([&](const std::string&) { ++events; });
  reader.Feed("data: cut off\n");
  EXPECT_EQ(events, 0);
}

TEST(HttpClient, NobodyThere) {
  const int port = FreePort("127.0.0.1", {}).value();
  const auto reply =
      HttpClient({"127.0.0.1", std::to_string(port), ""}).Get("/health", std::chrono::seconds(5));
  EXPECT_EQ(reply.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(reply.status().message()), HasSubstr(std::to_string(port)));
}

}  // namespace
}  // namespace tandem::cli
