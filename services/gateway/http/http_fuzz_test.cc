// Mutated request bytes, the same in every run: whatever arrives, the server answers or closes, and serves
// on.
#include <gtest/gtest.h>

#include <random>

#include "services/gateway/http/http_server.h"
#include "services/gateway/testing/raw_client.h"

namespace tandem::gateway {
namespace {

using testing::RawClient;

TEST(HttpFuzzTest, MutatedRequestsNeverStopTheServer) {
  HttpServerOptions options;
  options.listen = "127.0.0.1:0";
  options.max_body_bytes = 4096;
  options.read_timeout = absl::Milliseconds(100);
  options.idle_timeout = absl::Milliseconds(100);
  auto server = HttpServer::Start(options, [](Request request, Responder responder) {
    ASSERT_LE(request.body.size(), 4096u);
    if (request.body.size() % 2 == 0) {
      responder.Respond(200, "text/plain", request.body);
    } else {
      responder.StartStream(200, "text/plain");
      responder.Write(request.body);
      responder.Finish();
    }
  });
  ASSERT_TRUE(server.ok()) << server.status();

  const std::string seeds[] = {
      "GET /v1/models HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n",
      "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: "
      "13\r\n\r\n"
      "{\"model\":\"x\"}",
      "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n3;e=f\r\nxyz\r\n0\r\nT: "
      "v\r\n\r\n",
      "POST /x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\nabcd",
      "HEAD / HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET / HTTP/1.0\r\n\r\n",
  };
  const std::string tokens[] = {"\r\n",
                                "\r\n\r\n",
                                "\n",
                                "\r",
                                " ",
                                "\t",
                                ":",
                                "\0x",
                                "chunked",
                                "Content-Length: ",
                                "Transfer-Encoding: chunked\r\n",
                                "99999999999999999999",
                                "-1",
                                "HTTP/1.1",
                                "HTTP/9.9",
                                "\xff\xfe",
                                "0\r\n\r\n",
                                "ffffffff\r\n",
                                ";",
                                ","};
  std::mt19937 random(20260131);
  const auto pick = [&random](size_t n) { return static_cast<size_t>(random() % n); };
  int answered = 0;
  for (int round = 0; round < 1500; ++round) {
    std::string bytes = seeds[pick(std::size(seeds))];
    for (size_t mutations = 1 + pick(4); mutations > 0; --mutations) {
      const size_t at = pick(bytes.size() + 1);
      switch (pick(6)) {
        case 0:
          if (at < bytes.size()) bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes.insert(at, tokens[pick(std::size(tokens))]);
          break;
        case 2:
          bytes.erase(at, 1 + pick(8));
          break;
        case 3:
          bytes.resize(std::max<size_t>(at, 1));
          break;
        case 4:
          bytes += seeds[pick(std::size(seeds))];
          break;
        default: {
          const std::string part = bytes.substr(at, pick(32));
          bytes.insert(pick(bytes.size() + 1), part);
        }
      }
    }
    RawClient client((*server)->port());
    ASSERT_TRUE(client.connected()) << round;
    const size_t cut = pick(bytes.size() + 1);  // in two segments
    client.Send(std::string_view(bytes).substr(0, cut));
    client.Send(std::string_view(bytes).substr(cut));
    client.HalfClose();
    const std::string reply = client.ReadAll();
    EXPECT_TRUE(client.closed()) << round;
    if (!reply.empty()) {
      ASSERT_EQ(reply.substr(0, 7), "HTTP/1.") << round;
      ++answered;
    }
  }
  EXPECT_GT(answered, 500);  // the mutations reach behind the parser
  RawClient client((*server)->port());
  client.Send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
  EXPECT_EQ(client.ReadReply().status, 200);
}

}  // namespace
}  // namespace tandem::gateway
