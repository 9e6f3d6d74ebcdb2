// The `tandem` program against servers that misbehave and outputs that fail.
#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <functional>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "common/testing/process.h"

namespace tandem::cli {
namespace {

using testing::BinaryPath;
using ::testing::HasSubstr;
using testing::Process;
using testing::TempFolder;

// Answers each connection by the request's first line with the bytes that `answer` gives, and hangs up; says
// nothing where it gives none.
class FakeServer {
 public:
  explicit FakeServer(std::function<std::string(const std::string& request)> answer)
      : answer_(std::move(answer)), fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    if (bind(fd_, reinterpret_cast<sockaddr*>(&address), size) != 0 || listen(fd_, 8) != 0) std::abort();
    getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &size);
    url_ = absl::StrCat("http://127.0.0.1:", ntohs(address.sin_port));
    thread_ = std::thread([this] { Serve(); });
  }
  ~FakeServer() {
    shutdown(fd_, SHUT_RDWR);
    thread_.join();
    close(fd_);
  }
  const std::string& url() const { return url_; }

 private:
  void Serve() {
    while (true) {
      const int peer = accept4(fd_, nullptr, nullptr, SOCK_CLOEXEC);
      if (peer < 0) return;
      std::string request;
      char bytes[4096];
      while (request.find("\r\n\r\n") == std::string::npos) {
        const ssize_t n = read(peer, bytes, sizeof bytes);
        if (n <= 0) break;
        request.append(bytes, static_cast<size_t>(n));
      }
      const std::string reply = answer_(request.substr(0, request.find("\r\n")));
      if (!reply.empty()) (void)!send(peer, reply.data(), reply.size(), MSG_NOSIGNAL);
      if (!reply.empty()) shutdown(peer, SHUT_WR);
      while (read(peer, bytes, sizeof bytes) > 0) {  // until the client hangs up
      }
      close(peer);
    }
  }

  const std::function<std::string(const std::string&)> answer_;
  const int fd_;
  std::string url_;
  std::thread thread_;
};

std::string Models() {
  const std::string body = R"({"data": [{"id": "fake"}]})";
  return absl::StrCat("HTTP/1.1 200 OK\r\nContent-Length: ", body.size(), "\r\n\r\n", body);
}

std::string Chunk(const std::string& text) {
  return absl::StrCat(absl::Hex(text.size()), "\r\n", text, "\r\n");
}

// The beginning of a streamed answer: one piece of text.
std::string Piece() {
  return "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" +
         Chunk("data: {\"choices\": [{\"delta\": {\"content\": \"Hello\"}}]}\n\n");
}

std::string WholeAnswer() {
  return Piece() + Chunk("data: {\"choices\": [{\"delta\": {}, \"finish_reason\": \"stop\"}]}\n\n") +
         Chunk("data: [DONE]\n\n") + Chunk("");
}

std::string Answer(const std::string& request, const std::string& stream) {
  return request.starts_with("GET /v1/models ")              ? Models()
         : request.starts_with("POST /v1/chat/completions ") ? stream
                                                             : "HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n";
}

TEST(Chat, TheAddressMayEndWithTheApisVersion) {
  const FakeServer server([](const std::string& request) { return Answer(request, WholeAnswer()); });
  for (const char* end : {"", "/v1", "/v1/"}) {
    Process chat("tandem", {"chat", "--url", server.url() + end, "-p", "hi"});
    EXPECT_EQ(chat.Wait(), 0) << chat.Output();
    EXPECT_EQ(chat.Stdout(), "Hello\n");
  }
}

TEST(Chat, AServerThatSaysNothingIsLeftAfterTheTimeout) {
  const FakeServer server([](const std::string&) { return std::string(); });
  Process chat("tandem", {"chat", "--url", server.url(), "--timeout", "1", "-p", "hi"});
  EXPECT_EQ(chat.Wait(), 1);
  EXPECT_THAT(chat.Output(), HasSubstr("did not answer within 1 s"));
}

TEST(Chat, AConnectionThatIsLostIsCalledThat) {
  const FakeServer server([](const std::string& request) { return Answer(request, Piece()); });
  Process chat("tandem", {"chat", "--url", server.url(), "-p", "hi"});
  EXPECT_EQ(chat.Wait(), 1);
  EXPECT_THAT(chat.Stdout(), HasSubstr("Hello"));
  EXPECT_THAT(chat.Output(), HasSubstr("the connection was lost in the middle of the answer"));
}

TEST(Chat, EndsWhereItsOutputFails) {
  const FakeServer server([](const std::string& request) { return Answer(request, WholeAnswer()); });
  const std::string chat = BinaryPath("tandem") + " chat --url " + server.url();
  Process once("/bin/sh", {"-c", chat + " -p hi > /dev/full"});
  EXPECT_EQ(once.Wait(), 1);
  EXPECT_THAT(once.Output(), HasSubstr("cannot write the answer: No space left on device"));
  // This input does not end: the shell has the pipe's other end, too.
  const TempFolder folder;
  Process asking("/bin/sh", {"-c", "mkfifo " + (folder / "in") + "; exec 3<>" + (folder / "in") +
                                       "; echo hi >&3; " + chat + " <&3 > /dev/full"});
  EXPECT_EQ(asking.Wait(), 1);
  EXPECT_THAT(asking.Output(), HasSubstr("cannot write the answer: No space left on device"));
}

TEST(Output, ThatFailsIsNoSuccess) {
  for (const std::string& args : {std::string("plan"), std::string("--help"), std::string("--version")}) {
    Process tandem("/bin/sh", {"-c", BinaryPath("tandem") + " " + args + " > /dev/full"});
    EXPECT_EQ(tandem.Wait(), 1) << args;
    EXPECT_THAT(tandem.Output(), HasSubstr("cannot write to the standard output: No space left on device"));
  }
}

}  // namespace
}  // namespace tandem::cli
