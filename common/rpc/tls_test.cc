// TLS and mutual TLS with certificates that the openssl command makes here.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>

#include "common/rpc/channel.h"
#include "common/rpc/server.h"
#include "common/rpc/test_util.h"

namespace tandem::rpc {
namespace {

using testing::EchoExperts;
using ::testing::HasSubstr;
using testing::TempFolder;

class TlsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (std::system("command -v openssl >/dev/null 2>&1") != 0) GTEST_SKIP() << "openssl is not installed";
    ASSERT_TRUE(SelfSigned("server"));
    ASSERT_TRUE(SelfSigned("client"));
    ASSERT_TRUE(SelfSigned("stranger"));
  }
  bool SelfSigned(const std::string& name) {
    const std::string command =
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext "
        "subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout " +
        Key(name) + " -out " + Certificate(name) + " 2>/dev/null";
    return std::system(command.c_str()) == 0;
  }
  std::string Key(const std::string& name) { return folder_ / (name + ".key"); }
  std::string Certificate(const std::string& name) { return folder_ / (name + ".pem"); }

  absl::StatusOr<std::unique_ptr<Server>> Start(const TlsOptions& tls) {
    ServerOptions options;
    options.listen = {"localhost:0", "unix:" + (folder_ / "tls.sock")};
    options.tls = tls;
    return Server::Start(options, {&service_});
  }
  absl::Status Call(const std::string& address, const TlsOptions& tls) {
    auto channel = Connect(address, tls);
    if (!channel.ok()) return channel.status();
    auto stub = v1::Experts::NewStub(*channel);
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(10)));
    v1::ShardDescription answer;
    return FromGrpc(stub->Describe(&context, {}, &answer));
  }

  TempFolder folder_;
  EchoExperts service_;
};

TEST_F(TlsTest, ServerCertificate) {
  auto server = Start({.certificate_file = Certificate("server"), .key_file = Key("server"), .ca_file = ""});
  ASSERT_TRUE(server.ok()) << server.status();
  const std::string tcp = (*server)->addresses()[0];
  const auto trusting = [&](const char* ca) {
    return TlsOptions{.certificate_file = "", .key_file = "", .ca_file = Certificate(ca)};
  };
  EXPECT_TRUE(Call(tcp, trusting("server")).ok()) << Call(tcp, trusting("server"));
  EXPECT_FALSE(Call(tcp, trusting("stranger")).ok()) << "a certificate that nobody vouches for";
  EXPECT_FALSE(Call(tcp, {}).ok()) << "plain text at a TLS port";
  EXPECT_TRUE(Call((*server)->addresses()[1], trusting("server")).ok()) << "Unix sockets stay plain";
}

TEST_F(TlsTest, MutualTls) {
  auto server = Start({.certificate_file = Certificate("server"),
                       .key_file = Key("server"),
                       .ca_file = Certificate("client")});
  ASSERT_TRUE(server.ok()) << server.status();
  const std::string tcp = (*server)->addresses()[0];
  const auto as = [&](const char* name) {
    return TlsOptions{
        .certificate_file = Certificate(name), .key_file = Key(name), .ca_file = Certificate("server")};
  };
  EXPECT_TRUE(Call(tcp, as("client")).ok()) << Call(tcp, as("client"));
  EXPECT_FALSE(Call(tcp, as("stranger")).ok());
  EXPECT_FALSE(Call(tcp, {.certificate_file = "", .key_file = "", .ca_file = Certificate("server")}).ok())
      << "no client certificate";
}

TEST_F(TlsTest, ErrorsNameTheFile) {
  const std::string absent = folder_ / "absent.pem";
  auto server = Start({.certificate_file = absent, .key_file = Key("server"), .ca_file = ""});
  EXPECT_EQ(server.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(server.status().message()), HasSubstr(absent));

  const std::string garbage = folder_ / "garbage.pem";
  std::ofstream(garbage) << "hello";
  server = Start({.certificate_file = Certificate("server"), .key_file = garbage, .ca_file = ""});
  EXPECT_EQ(server.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(server.status().message()), HasSubstr(garbage));

  server = Start({.certificate_file = Certificate("server"), .key_file = Key("client"), .ca_file = ""});
  EXPECT_EQ(server.status().code(), absl::StatusCode::kInvalidArgument) << server.status();
  EXPECT_THAT(std::string(server.status().message()), HasSubstr(Key("client")));

  server = Start({.certificate_file = Certificate("server"), .key_file = "", .ca_file = ""});
  EXPECT_FALSE(server.ok());
  server = Start({.certificate_file = "", .key_file = "", .ca_file = Certificate("server")});
  EXPECT_FALSE(server.ok()) << "would run without TLS although a CA is given";
  EXPECT_EQ(
      Connect("localhost:1", {.certificate_file = "", .key_file = "", .ca_file = absent}).status().code(),
      absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace tandem::rpc
