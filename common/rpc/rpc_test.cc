// Servers and channels over real sockets.
#include <gmock/gmock.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <thread>

#include "common/base/listen.h"
#include "common/rpc/channel.h"
#include "common/rpc/server.h"
#include "common/rpc/test_util.h"

namespace tandem::rpc {
namespace {

using testing::EchoExperts;
using ::testing::HasSubstr;
using testing::TempFolder;

std::string Message(const absl::Status& status) { return std::string(status.message()); }

ServerOptions Listen(std::vector<std::string> addresses) {
  ServerOptions options;
  options.listen = std::move(addresses);
  return options;
}

grpc::Status CallDescribe(grpc::Channel& channel, absl::Duration deadline = absl::Seconds(10)) {
  auto stub =
      v1::Experts::NewStub(std::shared_ptr<grpc::ChannelInterface>(std::shared_ptr<void>(), &channel));
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + deadline));
  v1::ShardDescription answer;
  grpc::Status status = stub->Describe(&context, {}, &answer);
  if (status.ok()) {
    EXPECT_EQ(answer.model_name(), "echo");
  }
  return status;
}

TEST(RpcTest, TcpAndUnixTogether) {
  TempFolder folder;
  EchoExperts service;
  const std::string socket_path = folder / "e.sock";
  auto server = Server::Start(Listen({"127.0.0.1:0", "unix:" + socket_path}), {&service});
  ASSERT_TRUE(server.ok()) << server.status();
  ASSERT_EQ((*server)->addresses().size(), 2u);
  EXPECT_EQ((*server)->addresses()[1], "unix:" + socket_path);
  struct stat info {};
  ASSERT_EQ(stat(socket_path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
  for (const std::string& address : (*server)->addresses()) {
    auto channel = Connect(address);
    ASSERT_TRUE(channel.ok()) << channel.status();
    EXPECT_TRUE(CallDescribe(**channel).ok()) << address;
  }
  server->reset();
  EXPECT_NE(stat(socket_path.c_str(), &info), 0) << "the socket file is left over";
}

TEST(RpcTest, WildcardGivesAnAddressThatClientsCanUse) {
  EchoExperts service;
  auto server = Server::Start(Listen({"0.0.0.0:0"}), {&service});
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_THAT((*server)->addresses()[0], ::testing::MatchesRegex("localhost:[1-9][0-9]*"));
  auto channel = Connect((*server)->addresses()[0]);
  ASSERT_TRUE(channel.ok());
  EXPECT_TRUE(CallDescribe(**channel).ok());
}

TEST(RpcTest, HealthFlips) {
  EchoExperts service;
  auto server = Server::Start(Listen({"127.0.0.1:0"}), {&service});
  ASSERT_TRUE(server.ok()) << server.status();
  const std::string address = (*server)->addresses()[0];
  auto channel = Connect(address);
  ASSERT_TRUE(channel.ok());
  absl::Status waited = WaitServing(**channel, address, absl::Milliseconds(300));
  EXPECT_EQ(waited.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(Message(waited), HasSubstr(address));
  EXPECT_THAT(Message(waited), HasSubstr("the last answer was NOT_SERVING"));
  (*server)->SetServing(true);
  EXPECT_TRUE(WaitServing(**channel, address, absl::Seconds(5)).ok());
  (*server)->SetServing(false);
  EXPECT_FALSE(WaitServing(**channel, address, absl::Milliseconds(100)).ok());
}

// The answer to a grpc.health.v1 check of a name: "\x08\x01" is SERVING, "\x08\x02" NOT_SERVING.
absl::StatusOr<std::string> HealthOf(const std::shared_ptr<grpc::Channel>& channel, const std::string& name) {
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(10)));
  grpc::CompletionQueue queue;
  const grpc::Slice request("\x0a" + std::string(1, static_cast<char>(name.size())) + name);
  auto call =
      stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", grpc::ByteBuffer(&request, 1), &queue);
  call->StartCall();
  grpc::ByteBuffer answer;
  grpc::Status status;
  call->Finish(&answer, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  queue.Shutdown();
  while (queue.Next(&tag, &ok)) {
  }
  if (!status.ok()) return FromGrpc(status);
  grpc::Slice bytes;
  EXPECT_TRUE(answer.DumpToSingleSlice(&bytes).ok());
  return std::string(reinterpret_cast<const char*>(bytes.begin()), bytes.size());
}

TEST(RpcTest, HealthOfAServiceByItsName) {
  EchoExperts service;
  ServerOptions options = Listen({"127.0.0.1:0"});
  options.health_names = {"tandem.v1.Experts"};
  auto server = Server::Start(options, {&service});
  ASSERT_TRUE(server.ok()) << server.status();
  auto channel = Connect((*server)->addresses()[0]);
  ASSERT_TRUE(channel.ok());
  for (const bool serving : {false, true, false}) {
    (*server)->SetServing(serving);
    for (const char* name : {"", "tandem.v1.Experts"}) {
      EXPECT_EQ(HealthOf(*channel, name).value_or("?"), serving ? "\x08\x01" : "\x08\x02") << name;
    }
  }
  EXPECT_TRUE(absl::IsNotFound(HealthOf(*channel, "tandem.v1.Engine").status()));
}

TEST(RpcTest, WaitServingSaysThatNobodyIsThere) {
  TempFolder folder;
  const std::string address = "unix:" + (folder / "nobody.sock");
  auto channel = Connect(address);
  ASSERT_TRUE(channel.ok());
  const absl::Status waited = WaitServing(**channel, address, absl::Milliseconds(400));
  EXPECT_EQ(waited.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(Message(waited), HasSubstr("UNAVAILABLE"));
}

TEST(RpcTest, AChannelMadeBeforeItsServerConnectsSoonAfterItIsThere) {
  TempFolder folder;
  const std::string address = "unix:" + (folder / "late.sock");
  auto channel = Connect(address);
  ASSERT_TRUE(channel.ok());
  EXPECT_EQ(CallDescribe(**channel).error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_FALSE(WaitServing(**channel, address, absl::Seconds(1)).ok());  // several attempts fail
  EchoExperts service;
  auto server = Server::Start(Listen({address}), {&service});
  ASSERT_TRUE(server.ok()) << server.status();
  (*server)->SetServing(true);
  EXPECT_TRUE(WaitServing(**channel, address, absl::Seconds(3)).ok());
}

TEST(RpcTest, ReflectionTellsServicesAndFiles) {
  EchoExperts service;
  auto server = Server::Start(Listen({"127.0.0.1:0"}), {&service});
  ASSERT_TRUE(server.ok()) << server.status();
  auto channel = Connect((*server)->addresses()[0]);
  ASSERT_TRUE(channel.ok());
  // ServerReflectionRequest by hand: list_services = 7, file_containing_symbol = 4.
  const std::string symbol = "tandem.v1.Experts";
  const std::pair<std::string, std::string> cases[] = {
      {std::string("\x3a\x00", 2), "tandem.v1.Experts"},
      {"\x22" + std::string(1, static_cast<char>(symbol.size())) + symbol, "tandem/v1/experts.proto"}};
  for (const auto& [bytes, expected] : cases) {
    grpc::GenericStub stub(*channel);
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(10)));
    grpc::CompletionQueue queue;
    void* tag = nullptr;
    bool ok = false;
    auto call =
        stub.PrepareCall(&context, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", &queue);
    call->StartCall(nullptr);
    ASSERT_TRUE(queue.Next(&tag, &ok) && ok);
    const grpc::Slice slice(bytes);
    call->Write(grpc::ByteBuffer(&slice, 1), nullptr);
    ASSERT_TRUE(queue.Next(&tag, &ok) && ok);
    grpc::ByteBuffer answer;
    call->Read(&answer, nullptr);
    ASSERT_TRUE(queue.Next(&tag, &ok) && ok) << "no reflection service";
    std::vector<grpc::Slice> slices;
    ASSERT_TRUE(answer.Dump(&slices).ok());
    std::string text;
    for (const grpc::Slice& s : slices) text.append(reinterpret_cast<const char*>(s.begin()), s.size());
    EXPECT_THAT(text, HasSubstr(expected));
    call->WritesDone(nullptr);
    queue.Next(&tag, &ok);
    grpc::Status status;
    call->Finish(&status, nullptr);
    queue.Next(&tag, &ok);
    EXPECT_TRUE(status.ok()) << status.error_message();
    queue.Shutdown();
    while (queue.Next(&tag, &ok)) {
    }
  }
}

TEST(RpcTest, PortInUseNamesTheAddress) {
  EchoExperts service;
  auto first = Server::Start(Listen({"127.0.0.1:0"}), {&service});
  ASSERT_TRUE(first.ok());
  const std::string address = (*first)->addresses()[0];
  EchoExperts other;
  auto second = Server::Start(Listen({address}), {&other});
  EXPECT_EQ(second.status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(Message(second.status()), HasSubstr(address));
  first->reset();
  auto third = Server::Start(Listen({address}), {&other});
  EXPECT_TRUE(third.ok()) << third.status();
}

TEST(RpcTest, UnixSocketInUseAndStale) {
  TempFolder folder;
  const std::string path = folder / "s.sock";
  EchoExperts service;
  {
    auto first = Server::Start(Listen({"unix:" + path}), {&service});
    ASSERT_TRUE(first.ok()) << first.status();
    EchoExperts other;
    auto second = Server::Start(Listen({"unix:" + path}), {&other});
    EXPECT_EQ(second.status().code(), absl::StatusCode::kAlreadyExists);
    EXPECT_THAT(Message(second.status()), HasSubstr(path));
    // The refused one did not take the file of the first away.
    auto channel = Connect("unix:" + path);
    ASSERT_TRUE(channel.ok());
    EXPECT_TRUE(CallDescribe(**channel).ok());
  }
  // A socket file whose process died: bound, then closed without being removed.
  sockaddr_un at{};
  at.sun_family = AF_UNIX;
  std::memcpy(at.sun_path, path.c_str(), path.size() + 1);
  const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
  ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&at), sizeof at), 0);
  close(fd);
  auto again = Server::Start(Listen({"unix:" + path}), {&service});
  EXPECT_TRUE(again.ok()) << again.status();
}

TEST(RpcTest, BadListenAddresses) {
  TempFolder folder;
  EchoExperts service;
  const std::string file = folder / "plain.txt";
  std::ofstream(file) << "not a socket";
  const std::string deep = folder / "none/e.sock";
  const std::string longer = folder / std::string(200, 'x');
  const std::pair<std::string, absl::StatusCode> cases[] = {
      {"10010", absl::StatusCode::kInvalidArgument},
      {"localhost:many", absl::StatusCode::kInvalidArgument},
      {"localhost:65536", absl::StatusCode::kInvalidArgument},
      {"no-such-host.invalid:1", absl::StatusCode::kNotFound},
      {"192.0.2.1:0", absl::StatusCode::kNotFound},
      {"unix:", absl::StatusCode::kInvalidArgument},
      {"unix:" + longer, absl::StatusCode::kInvalidArgument},
      {"unix:" + deep, absl::StatusCode::kNotFound},
      {"unix:" + file, absl::StatusCode::kAlreadyExists}};
  for (const auto& [address, code] : cases) {
    auto server = Server::Start(Listen({address}), {&service});
    EXPECT_EQ(server.status().code(), code) << address << ": " << server.status();
    EXPECT_THAT(Message(server.status()), HasSubstr(address));
  }
  EXPECT_FALSE(Server::Start(Listen({}), {&service}).ok());
  EXPECT_EQ(Connect("localhost:0").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Connect("localhost").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(RpcTest, LargeMessagesAndTheirLimit) {
  TempFolder folder;
  EchoExperts service;
  ServerOptions options = Listen({"unix:" + (folder / "big.sock")});
  options.max_message_bytes = 40 << 20;
  auto server = Server::Start(options, {&service});
  ASSERT_TRUE(server.ok()) << server.status();
  auto channel = Connect((*server)->addresses()[0]);
  ASSERT_TRUE(channel.ok());
  auto stub = v1::Experts::NewStub(*channel);
  {
    grpc::ClientContext context;
    auto stream = stub->Forward(&context);
    v1::ForwardRequest request;
    request.mutable_activations()->assign(32 << 20, 'a');
    request.mutable_activations()->back() = 'z';
    ASSERT_TRUE(stream->Write(request));
    v1::ForwardResponse response;
    ASSERT_TRUE(stream->Read(&response));
    EXPECT_EQ(response.answer(), request.activations());
    stream->WritesDone();
    EXPECT_TRUE(stream->Finish().ok());
  }
  grpc::ClientContext context;
  auto stream = stub->Forward(&context);
  v1::ForwardRequest request;
  request.mutable_activations()->assign(41 << 20, 'a');
  stream->Write(request);
  v1::ForwardResponse response;
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(CallDescribe(**channel).ok());
}

TEST(RpcTest, Deadline) {
  TempFolder folder;
  EchoExperts service;
  service.describe_milliseconds = 20'000;
  auto server = Server::Start(Listen({"unix:" + (folder / "d.sock")}), {&service});
  ASSERT_TRUE(server.ok()) << server.status();
  auto channel = Connect((*server)->addresses()[0]);
  ASSERT_TRUE(channel.ok());
  const grpc::Status status = CallDescribe(**channel, absl::Milliseconds(200));
  EXPECT_EQ(FromGrpc(status).code(), absl::StatusCode::kDeadlineExceeded);
  for (int i = 0; i < 400 && !service.cancelled; ++i) absl::SleepFor(absl::Milliseconds(5));
  EXPECT_TRUE(service.cancelled) << "the server goes on working for nobody";
}

TEST(RpcTest, ShutdownLetsARunningCallEnd) {
  TempFolder folder;
  EchoExperts service;
  service.describe_milliseconds = 400;
  auto server = Server::Start(Listen({"unix:" + (folder / "s.sock")}), {&service});
  ASSERT_TRUE(server.ok()) << server.status();
  auto channel = Connect((*server)->addresses()[0]);
  ASSERT_TRUE(channel.ok());
  grpc::Status running;
  std::thread caller([&] { running = CallDescribe(**channel); });
  while (!service.started) absl::SleepFor(absl::Milliseconds(1));
  (*server)->Shutdown(absl::Seconds(20));
  caller.join();
  EXPECT_TRUE(running.ok()) << running.error_message();
  EXPECT_FALSE(service.cancelled);
  EXPECT_EQ(CallDescribe(**channel).error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST(RpcTest, ShutdownDoesNotWaitForIdleClients) {
  TempFolder folder;
  EchoExperts service;
  auto server = Server::Start(Listen({"unix:" + (folder / "s.sock")}), {&service});
  ASSERT_TRUE(server.ok()) << server.status();
  (*server)->SetServing(true);
  const std::string address = (*server)->addresses()[0];
  auto channel = Connect(address);
  ASSERT_TRUE(channel.ok());
  ASSERT_TRUE(WaitServing(**channel, address, absl::Seconds(5)).ok());
  // A health watcher never ends by itself.
  grpc::GenericStub stub(*channel);
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  auto watch = stub.PrepareCall(&context, "/grpc.health.v1.Health/Watch", &queue);
  void* tag = nullptr;
  bool ok = false;
  watch->StartCall(nullptr);
  ASSERT_TRUE(queue.Next(&tag, &ok) && ok);
  watch->Write(grpc::ByteBuffer(nullptr, 0), nullptr);
  ASSERT_TRUE(queue.Next(&tag, &ok) && ok);
  grpc::ByteBuffer answer;
  watch->Read(&answer, nullptr);
  ASSERT_TRUE(queue.Next(&tag, &ok) && ok);
  const absl::Time before = absl::Now();
  (*server)->Shutdown(absl::Seconds(30));
  EXPECT_LT(absl::Now() - before, absl::Seconds(4));
  while (ok) {
    watch->Read(&answer, nullptr);
    queue.Next(&tag, &ok);
  }
  grpc::Status status;
  watch->Finish(&status, nullptr);
  queue.Next(&tag, &ok);
  EXPECT_FALSE(status.ok());
  queue.Shutdown();
  while (queue.Next(&tag, &ok)) {
  }
}

TEST(RpcTest, ShutdownCancelsWhatOutlivesThePatience) {
  TempFolder folder;
  EchoExperts service;
  service.describe_milliseconds = 60'000;
  auto server = Server::Start(Listen({"unix:" + (folder / "s.sock")}), {&service});
  ASSERT_TRUE(server.ok()) << server.status();
  auto channel = Connect((*server)->addresses()[0]);
  ASSERT_TRUE(channel.ok());
  grpc::Status running;
  std::thread caller([&] { running = CallDescribe(**channel, absl::Seconds(50)); });
  while (!service.started) absl::SleepFor(absl::Milliseconds(1));
  const absl::Time before = absl::Now();
  (*server)->Shutdown(absl::Milliseconds(200));
  EXPECT_LT(absl::Now() - before, absl::Seconds(10));
  caller.join();
  EXPECT_FALSE(running.ok());
  EXPECT_TRUE(service.cancelled);
}

TEST(StatusTest, MappingIsLossless) {
  for (int code = 1; code <= 16; ++code) {
    const absl::Status status(static_cast<absl::StatusCode>(code), "why");
    EXPECT_EQ(FromGrpc(ToGrpc(status)), status);
    EXPECT_EQ(static_cast<int>(ToGrpc(status).error_code()), code);
  }
  EXPECT_TRUE(ToGrpc(absl::OkStatus()).ok());
  EXPECT_TRUE(FromGrpc(grpc::Status::OK).ok());
  EXPECT_EQ(FromGrpc(grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "full")),
            absl::ResourceExhaustedError("full"));
}

TEST(StatusTest, Http) {
  EXPECT_EQ(HttpStatusOf(absl::StatusCode::kOk), 200);
  EXPECT_EQ(HttpStatusOf(absl::StatusCode::kInvalidArgument), 400);
  EXPECT_EQ(HttpStatusOf(absl::StatusCode::kOutOfRange), 400);
  EXPECT_EQ(HttpStatusOf(absl::StatusCode::kNotFound), 404);
  EXPECT_EQ(HttpStatusOf(absl::StatusCode::kResourceExhausted), 429);
  EXPECT_EQ(HttpStatusOf(absl::StatusCode::kUnavailable), 503);
  EXPECT_EQ(HttpStatusOf(absl::StatusCode::kDeadlineExceeded), 504);
  EXPECT_EQ(HttpStatusOf(absl::StatusCode::kInternal), 500);
}

TEST(ListenTest, ParsesAddresses) {
  const auto v6 = ParseHostPort("[::1]:80");
  ASSERT_TRUE(v6.ok());
  EXPECT_EQ(v6->host, "::1");
  EXPECT_EQ(v6->ToString(), "[::1]:80");
  EXPECT_TRUE(ParseHostPort("[::]:0")->IsWildcard());
  EXPECT_TRUE(ParseHostPort("0.0.0.0:1")->IsWildcard());
  EXPECT_FALSE(ParseHostPort("localhost:1")->IsWildcard());
  EXPECT_FALSE(ParseHostPort("").ok());
  EXPECT_FALSE(ParseHostPort("a:-1").ok());
  EXPECT_FALSE(ParseHostPort("a:+1").ok());
}

}  // namespace
}  // namespace tandem::rpc
