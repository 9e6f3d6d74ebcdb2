#include "services/gateway/http/http_server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <thread>

#include "services/gateway/testing/raw_client.h"

namespace tandem::gateway {
namespace {

using ::testing::HasSubstr;
using testing::HttpReply;
using testing::RawClient;
using ::testing::StartsWith;

// /echo answers method, target and body; /stream streams until told to stop; /hold keeps the responder.
class HttpServerTest : public ::testing::Test {
 protected:
  void Start(HttpServerOptions options = {}) {
    options.listen = "127.0.0.1:0";
    options.error_body = [](int status, std::string_view message) {
      return "E" + std::to_string(status) + " " + std::string(message);
    };
    auto server = HttpServer::Start(
        options, [this](Request request, Responder r) { Handle(std::move(request), std::move(r)); });
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = std::move(*server);
  }
  void TearDown() override {
    stop_.store(true);
    for (std::thread& thread : threads_) thread.join();
    held_.reset();
    server_.reset();
  }

  void Handle(Request request, Responder responder) {
    ++requests_;
    const std::string_view path = request.Path();
    if (path == "/stream") {
      std::lock_guard lock(mutex_);
      threads_.emplace_back([this, responder = std::move(responder)]() mutable {
        responder.OnDisconnect([this] { ++disconnects_; });
        responder.StartStream(200, "text/plain");
        const std::string block(64 << 10, 's');
        while (!stop_.load() && responder.Write(block)) {
          max_unsent_ = std::max(max_unsent_, responder.unsent_bytes());
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        responder.Finish();
      });
    } else if (path == "/hold") {
      responder.OnDisconnect([this] { ++disconnects_; });
      std::lock_guard lock(mutex_);
      held_.emplace(std::move(responder));
      changed_.notify_all();
    } else if (path == "/short-stream") {
      responder.StartStream(200, "text/plain", {{"X-A", "b"}});
      responder.Write("one ");
      responder.Write("");
      responder.Write("two");
      responder.Finish();
    } else if (path == "/cut") {
      responder.StartStream(200, "text/plain");
      responder.Write("half");
    } else if (path == "/drop") {
    } else {
      responder.Respond(200, "text/plain", request.method + " " + request.target + " " + request.body);
    }
  }

  void WaitHeld() {
    std::unique_lock lock(mutex_);
    ASSERT_TRUE(changed_.wait_for(lock, std::chrono::seconds(10), [this] { return held_.has_value(); }));
  }
  bool WaitDisconnects(int count) {
    for (int i = 0; i < 30000 && disconnects_ < count; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return disconnects_ == count;
  }

  std::atomic<int> requests_{0};
  std::atomic<int> disconnects_{0};
  std::atomic<bool> stop_{false};
  size_t max_unsent_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<Responder> held_;
  std::vector<std::thread> threads_;
  std::unique_ptr<HttpServer> server_;
};

TEST_F(HttpServerTest, KeepAliveServesManyRequestsOnOneConnection) {
  Start();
  RawClient client(server_->port());
  for (int i = 0; i < 50; ++i) {
    const std::string target = "/echo?" + std::to_string(i);
    client.Send("GET " + target + " HTTP/1.1\r\nHost: x\r\n\r\n");
    const HttpReply reply = client.ReadReply();
    EXPECT_EQ(reply.status, 200);
    EXPECT_EQ(reply.body, "GET " + target + " ");
  }
  EXPECT_EQ(server_->connections(), 1u);
}

TEST_F(HttpServerTest, PipelinedRequestsAreAnsweredInOrder) {
  Start();
  RawClient client(server_->port());
  std::string bytes;
  for (int i = 0; i < 300; ++i) {
    const std::string body = "b" + std::to_string(i);
    bytes += "POST /p" + std::to_string(i) +
             " HTTP/1.1\r\nHost: x\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
  }
  std::thread sender([&] { client.Send(bytes); });
  for (int i = 0; i < 300; ++i) {
    const HttpReply reply = client.ReadReply();
    ASSERT_EQ(reply.body, "POST /p" + std::to_string(i) + " b" + std::to_string(i));
  }
  sender.join();
}

TEST_F(HttpServerTest, RequestsArriveByteByByte) {
  Start();
  RawClient client(server_->port());
  for (const char c : std::string("\r\nPOST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")) {
    ASSERT_TRUE(client.Send(std::string(1, c)));
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  EXPECT_EQ(client.ReadReply().body, "POST /slow abc");
}

TEST_F(HttpServerTest, ChunkedUpload) {
  Start();
  RawClient client(server_->port());
  client.Send("POST /c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n");
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  client.Send("a;name=value\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\nGET /next HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(client.ReadReply().body, "POST /c abc0123456789");
  EXPECT_EQ(client.ReadReply().body, "GET /next ");
}

TEST_F(HttpServerTest, ExpectContinueIsAnsweredBeforeTheBody) {
  Start();
  RawClient client(server_->port());
  client.Send("POST /e HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n");
  EXPECT_EQ(client.ReadUntil("\r\n\r\n"), "HTTP/1.1 100 Continue\r\n\r\n");
  client.Send("hi");
  EXPECT_EQ(client.ReadReply().body, "POST /e hi");
}

TEST_F(HttpServerTest, HeadHasTheLengthAndNoBody) {
  Start();
  RawClient client(server_->port());
  client.Send("HEAD /h HTTP/1.1\r\nHost: x\r\n\r\n");
  const HttpReply reply = client.ReadReply(/*head_request=*/true);
  EXPECT_EQ(reply.status, 200);
  EXPECT_EQ(reply.headers.at("content-length"), "8");
  client.Send("HEAD /short-stream HTTP/1.1\r\nHost: x\r\n\r\nGET /after HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(client.ReadReply(/*head_request=*/true).status, 200);
  EXPECT_EQ(client.ReadReply().body, "GET /after ");
}

TEST_F(HttpServerTest, StreamsAreChunkedAndTheConnectionLivesOn) {
  Start();
  RawClient client(server_->port());
  client.Send("GET /short-stream HTTP/1.1\r\nHost: x\r\n\r\n");
  const HttpReply reply = client.ReadReply();
  EXPECT_TRUE(reply.complete);
  EXPECT_EQ(reply.body, "one two");
  EXPECT_EQ(reply.headers.at("x-a"), "b");
  client.Send("GET /2 HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(client.ReadReply().body, "GET /2 ");
}

TEST_F(HttpServerTest, Http10StreamsUntilTheEndOfTheConnection) {
  Start();
  RawClient client(server_->port());
  client.Send("GET /short-stream HTTP/1.0\r\n\r\n");
  const std::string all = client.ReadAll();
  EXPECT_THAT(all, StartsWith("HTTP/1.0 200 OK\r\n"));
  EXPECT_THAT(all, ::testing::EndsWith("\r\n\r\none two"));
  EXPECT_TRUE(client.closed());
}

TEST_F(HttpServerTest, ConnectionCloseIsObeyed) {
  Start();
  RawClient client(server_->port());
  client.Send("GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  const std::string all = client.ReadAll();
  EXPECT_THAT(all, HasSubstr("Connection: close\r\n"));
  EXPECT_TRUE(client.closed());
}

TEST_F(HttpServerTest, OversizedHeadersAndBodiesAreRefused) {
  HttpServerOptions options;
  options.max_body_bytes = 1000;
  Start(options);
  {
    RawClient client(server_->port());
    client.Send("GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + std::string(20 << 10, 'a') + "\r\n\r\n");
    const HttpReply reply = client.ReadReply();
    EXPECT_EQ(reply.status, 431);
    EXPECT_EQ(reply.body, "E431 the request's headers are larger than 16384 bytes");
    client.ReadAll();
    EXPECT_TRUE(client.closed());
  }
  {
    RawClient client(server_->port());  // announced: refused before a byte of it arrives
    client.Send("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n");
    const HttpReply reply = client.ReadReply();
    EXPECT_EQ(reply.status, 413);
    EXPECT_EQ(reply.body, "E413 the request's body is larger than 1000 bytes");
  }
  {
    RawClient client(server_->port());  // not announced
    client.Send("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
    for (int i = 0; i < 20; ++i) client.Send("64\r\n" + std::string(100, 'x') + "\r\n");
    EXPECT_EQ(client.ReadReply().status, 413);
  }
  {
    RawClient client(server_->port());  // the largest that is allowed
    client.Send("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + std::string(1000, 'y'));
    EXPECT_EQ(client.ReadReply().status, 200);
  }
  {
    RawClient client(server_->port());  // a chunk header that never ends
    client.Send("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;" +
                std::string(40000, 'e'));
    EXPECT_EQ(client.ReadReply().status, 400);
  }
  EXPECT_EQ(requests_, 1);
}

struct BadRequest {
  const char* name;
  const char* bytes;
  int status;
};

class BadRequestTest : public HttpServerTest, public ::testing::WithParamInterface<BadRequest> {};

TEST_P(BadRequestTest, IsRefusedAndTheServerServesOn) {
  Start();
  RawClient client(server_->port());
  client.Send(GetParam().bytes);
  const HttpReply reply = client.ReadReply();
  EXPECT_EQ(reply.status, GetParam().status) << GetParam().name;
  EXPECT_THAT(reply.body, StartsWith("E" + std::to_string(GetParam().status) + " "));
  client.HalfClose();
  client.ReadAll();
  EXPECT_TRUE(client.closed());
  EXPECT_EQ(requests_, 0);
  RawClient other(server_->port());
  other.Send("GET /ok HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(other.ReadReply().body, "GET /ok ");
}

INSTANTIATE_TEST_SUITE_P(
    Http, BadRequestTest,
    ::testing::Values(
        BadRequest{"garbage", "\x16\x03\x01\x02 hello\r\n\r\n", 400},
        BadRequest{"no version", "GET /\r\n\r\n", 400},
        BadRequest{"http2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505},
        BadRequest{"no host", "GET / HTTP/1.1\r\n\r\n", 400},
        BadRequest{"two hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400},
        BadRequest{"no colon", "GET / HTTP/1.1\r\nHost: a\r\nnonsense\r\n\r\n", 400},
        BadRequest{"space before colon", "GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400},
        BadRequest{"bad length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1x\r\n\r\n", 400},
        BadRequest{"negative length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400},
        BadRequest{"two lengths",
                   "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400},
        BadRequest{"length and chunked",
                   "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
                   400},
        BadRequest{"chunked and length",
                   "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
                   400},
        BadRequest{"gzip transfer", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501},
        BadRequest{"bad chunk size",
                   "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n", 400},
        BadRequest{"huge chunk size",
                   "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
                   413},
        BadRequest{"overflowing chunk size",
                   "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff0\r\n",
                   400},
        BadRequest{"expectation",
                   "POST / HTTP/1.1\r\nHost: a\r\nExpect: miracles\r\nContent-Length: 1\r\n\r\n", 417}));

TEST_F(HttpServerTest, SlowHeadersBodiesAndIdleConnectionsTimeOut) {
  HttpServerOptions options;
  options.read_timeout = absl::Milliseconds(150);
  options.idle_timeout = absl::Milliseconds(300);
  Start(options);
  RawClient head(server_->port()), body(server_->port()), idle(server_->port());
  head.Send("GET / HT");
  body.Send("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab");
  EXPECT_EQ(head.ReadReply().status, 408);
  EXPECT_EQ(body.ReadReply().status, 408);
  EXPECT_EQ(idle.ReadAll(), "");
  EXPECT_TRUE(idle.closed());
}

TEST_F(HttpServerTest, DisconnectDuringAnAnswerIsReportedOnce) {
  Start();
  auto client = std::make_unique<RawClient>(server_->port());
  client->Send("GET /hold HTTP/1.1\r\nHost: x\r\n\r\n");
  WaitHeld();
  EXPECT_EQ(disconnects_, 0);
  client->Close();
  EXPECT_TRUE(WaitDisconnects(1));
  EXPECT_TRUE(held_->disconnected());
  held_->Respond(200, "text/plain", "too late");
  EXPECT_FALSE(held_->Write("x"));
  int late = 0;
  held_->OnDisconnect([&late] { ++late; });
  EXPECT_EQ(late, 1);
  EXPECT_EQ(disconnects_, 1);
}

TEST_F(HttpServerTest, DisconnectIsSeenBehindPipelinedBytes) {
  Start();
  auto client = std::make_unique<RawClient>(server_->port());
  client->Send("GET /hold HTTP/1.1\r\nHost: x\r\n\r\nGET /never HTTP/1.1\r\nHost: x\r\n\r\n");
  WaitHeld();
  client->Close();
  EXPECT_TRUE(WaitDisconnects(1));
  EXPECT_EQ(requests_, 1);
}

TEST_F(HttpServerTest, NoDisconnectAfterAFinishedAnswer) {
  Start();
  auto client = std::make_unique<RawClient>(server_->port());
  client->Send("GET /hold HTTP/1.1\r\nHost: x\r\n\r\n");
  WaitHeld();
  held_->Respond(200, "text/plain", "done");
  EXPECT_EQ(client->ReadReply().body, "done");
  client->Close();
  for (int i = 0; i < 500 && server_->connections() > 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  EXPECT_EQ(server_->connections(), 0u);
  EXPECT_EQ(disconnects_, 0);
}

TEST_F(HttpServerTest, AClientThatDoesNotReadIsCutOffAndItsMemoryIsBounded) {
  HttpServerOptions options;
  options.max_output_bytes = 256 << 10;
  Start(options);
  RawClient client(server_->port(), /*receive_buffer=*/4096);
  client.Send("GET /stream HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_TRUE(WaitDisconnects(1));
  EXPECT_LE(max_unsent_, options.max_output_bytes);
  for (int i = 0; i < 500 && server_->connections() > 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  EXPECT_EQ(server_->connections(), 0u);
}

TEST_F(HttpServerTest, WriteTimeoutCutsAReaderThatStalls) {
  HttpServerOptions options;
  options.write_timeout = absl::Milliseconds(200);
  options.max_output_bytes = size_t{1} << 30;
  Start(options);
  RawClient client(server_->port(), /*receive_buffer=*/4096);
  client.Send("GET /stream HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_TRUE(WaitDisconnects(1));
}

TEST_F(HttpServerTest, DroppedRespondersAnswer500OrCutTheStream) {
  Start();
  {
    RawClient client(server_->port());
    client.Send("GET /drop HTTP/1.1\r\nHost: x\r\n\r\n");
    EXPECT_EQ(client.ReadReply().status, 500);
  }
  RawClient client(server_->port());
  client.Send("GET /cut HTTP/1.1\r\nHost: x\r\n\r\n");
  const HttpReply reply = client.ReadReply();
  EXPECT_FALSE(reply.complete);
  EXPECT_TRUE(client.closed());
}

TEST_F(HttpServerTest, ManyIdleConnections) {
  Start();
  std::vector<std::unique_ptr<RawClient>> clients;
  for (int i = 0; i < 400; ++i) {
    clients.push_back(std::make_unique<RawClient>(server_->port()));
    ASSERT_TRUE(clients.back()->connected());
  }
  for (auto& client : clients) client->Send("GET /i HTTP/1.1\r\nHost: x\r\n\r\n");
  for (auto& client : clients) EXPECT_EQ(client->ReadReply().body, "GET /i ");
  EXPECT_EQ(server_->connections(), 400u);
}

TEST_F(HttpServerTest, ConnectionsBeyondTheLimitAreClosed) {
  HttpServerOptions options;
  options.max_connections = 2;
  Start(options);
  RawClient a(server_->port()), b(server_->port());
  a.Send("GET /a HTTP/1.1\r\nHost: x\r\n\r\n");
  b.Send("GET /b HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(a.ReadReply().status, 200);
  EXPECT_EQ(b.ReadReply().status, 200);
  RawClient c(server_->port());
  EXPECT_EQ(c.ReadAll(), "");
  EXPECT_TRUE(c.closed());
}

TEST_F(HttpServerTest, ShutdownLetsAnswersEndAndClosesIdleConnections) {
  Start();
  RawClient idle(server_->port()), busy(server_->port());
  idle.Send("GET /a HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(idle.ReadReply().status, 200);
  busy.Send("GET /hold HTTP/1.1\r\nHost: x\r\n\r\n");
  WaitHeld();
  std::thread shutdown([this] { server_->Shutdown(absl::Seconds(10)); });
  EXPECT_EQ(idle.ReadAll(), "");
  EXPECT_TRUE(idle.closed());
  held_->Respond(200, "text/plain", "last");
  const HttpReply reply = busy.ReadReply();
  EXPECT_EQ(reply.body, "last");
  EXPECT_EQ(reply.headers.at("connection"), "close");
  shutdown.join();
  EXPECT_FALSE(RawClient(server_->port()).connected());
}

TEST_F(HttpServerTest, ShutdownCutsWhatDoesNotEnd) {
  Start();
  RawClient busy(server_->port());
  busy.Send("GET /hold HTTP/1.1\r\nHost: x\r\n\r\n");
  WaitHeld();
  server_->Shutdown(absl::Milliseconds(50));
  EXPECT_EQ(disconnects_, 1);
  EXPECT_EQ(busy.ReadAll(), "");
}

TEST(HttpServerStartTest, PortInUseAndBadAddressesAreNamed) {
  HttpServerOptions options;
  options.listen = "127.0.0.1:0";
  const auto handler = [](Request, Responder) {};
  auto first = HttpServer::Start(options, handler);
  ASSERT_TRUE(first.ok());
  options.listen = (*first)->address();
  const auto second = HttpServer::Start(options, handler);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr((*first)->address() + " is already in use"));
  for (const char* bad : {"", "10002", "host.invalid:1", "127.0.0.1:70000", "127.0.0.1:x", "127.0.0.1:"}) {
    options.listen = bad;
    EXPECT_EQ(HttpServer::Start(options, handler).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

TEST(RequestTest, PathOfEveryFormOfTarget) {
  Request request;
  const std::pair<const char*, const char*> cases[] = {
      {"/a/b?c=d", "/a/b"}, {"/", "/"}, {"http://h:1/x?y", "/x"},
      {"http://h", "/"},    {"*", "*"}, {"/a#b", "/a"}};
  for (const auto& [target, path] : cases) {
    request.target = target;
    EXPECT_EQ(request.Path(), path);
  }
}

}  // namespace
}  // namespace tandem::gateway
