#include "common/rpc/channel.h"

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/support/byte_buffer.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/listen.h"
#include "common/base/status_macros.h"
#include "common/rpc/address.h"

namespace tandem::rpc {
namespace {

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> Credentials(const TlsOptions& tls) {
  if (tls.certificate_file.empty() && tls.ca_file.empty() && tls.key_file.empty()) {
    return grpc::InsecureChannelCredentials();
  }
  if (tls.certificate_file.empty() != tls.key_file.empty()) {
    return absl::InvalidArgumentError("TLS: a client certificate and its key must be given together");
  }
  grpc::SslCredentialsOptions options;
  if (!tls.ca_file.empty()) {
    TANDEM_ASSIGN_OR_RETURN(options.pem_root_certs, ReadPem(tls.ca_file, "CA"));
  }
  if (!tls.certificate_file.empty()) {
    TANDEM_ASSIGN_OR_RETURN(options.pem_cert_chain, ReadPem(tls.certificate_file, "certificate"));
    TANDEM_ASSIGN_OR_RETURN(options.pem_private_key, ReadPem(tls.key_file, "key"));
  }
  return grpc::SslCredentials(options);
}

grpc::ChannelArguments Arguments() {
  grpc::ChannelArguments args;
  args.SetMaxReceiveMessageSize(-1);  // the servers have the limits
  args.SetMaxSendMessageSize(-1);
  args.SetCompressionAlgorithm(GRPC_COMPRESS_NONE);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 15'000);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10'000);
  args.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  args.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  args.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 2'000);
  // Bounds from below both the pause before the next attempt and the time that one attempt may take, the TLS
  // handshake included; both grow with the backoff.
  args.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 200);
  // A channel's backoff is its own; and our processes are never behind a proxy.
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  args.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  args.SetInt(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1);
  return args;
}

// The `status` field (number 1, an enum) of a serialized grpc.health.v1.HealthCheckResponse; the message has
// no other fields today, unknown ones end the search.
int HealthStatusOf(const std::string& bytes) {
  if (bytes.size() < 2 || bytes[0] != 0x08) return 0;
  return static_cast<unsigned char>(bytes[1]);
}

const char* HealthName(int status) {
  switch (status) {
    case 1:
      return "SERVING";
    case 2:
      return "NOT_SERVING";
    case 3:
      return "SERVICE_UNKNOWN";
    default:
      return "UNKNOWN";
  }
}

// One grpc.health.v1.Health/Check of the whole server, made of bytes: it needs no generated code.
absl::StatusOr<int> CheckHealth(grpc::GenericStub& stub, absl::Time deadline, bool wait_for_ready) {
  grpc::ClientContext context;
  context.set_wait_for_ready(wait_for_ready);
  context.set_deadline(absl::ToChronoTime(deadline));
  grpc::CompletionQueue queue;
  const grpc::ByteBuffer request(nullptr, 0);
  auto call = stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", request, &queue);
  call->StartCall();
  grpc::ByteBuffer response;
  grpc::Status status;
  call->Finish(&response, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  queue.Shutdown();
  while (queue.Next(&tag, &ok)) {
  }
  TANDEM_RETURN_IF_ERROR(FromGrpc(status));
  std::vector<grpc::Slice> slices;
  std::string bytes;
  if (response.Dump(&slices).ok()) {
    for (const grpc::Slice& slice : slices) {
      bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
    }
  }
  return HealthStatusOf(bytes);
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::Channel>> Connect(const std::string& address, const TlsOptions& tls,
                                                       const std::string& tls_name) {
  KeepGrpc();
  if (const std::optional<std::string> path = UnixPath(address)) {
    if (path->empty()) return absl::InvalidArgumentError("address \"unix:\" has no path");
    grpc::ChannelArguments args = Arguments();
    args.SetString(GRPC_ARG_DEFAULT_AUTHORITY, "localhost");
    return grpc::CreateCustomChannel(absl::StrCat("unix:", *path), grpc::InsecureChannelCredentials(), args);
  }
  TANDEM_ASSIGN_OR_RETURN(const HostPort at, ParseHostPort(address));
  if (at.port == 0) {
    return absl::InvalidArgumentError(absl::StrCat("address \"", address, "\" has port 0"));
  }
  TANDEM_ASSIGN_OR_RETURN(auto credentials, Credentials(tls));
  grpc::ChannelArguments args = Arguments();
  if (!tls_name.empty()) args.SetSslTargetNameOverride(tls_name);
  return grpc::CreateCustomChannel(at.ToString(), credentials, args);
}

absl::Status WaitServing(grpc::Channel& channel, const std::string& address, absl::Duration patience) {
  // The stub wants shared ownership; the channel outlives it here.
  grpc::GenericStub stub(std::shared_ptr<grpc::ChannelInterface>(std::shared_ptr<void>(), &channel));
  const absl::Time deadline = absl::Now() + patience;
  std::string last = "no answer";
  do {
    // The wait is inside the call: a channel that nobody waits on goes on connecting only now and then.
    absl::StatusOr<int> health = CheckHealth(stub, std::min(deadline, absl::Now() + absl::Seconds(1)), true);
    if (health.ok() && *health == 1) return absl::OkStatus();
    if (absl::IsDeadlineExceeded(health.status())) {
      // A call that does not wait tells why there is no connection.
      health = CheckHealth(stub, absl::Now() + absl::Milliseconds(200), false);
      if (health.ok() && *health == 1) return absl::OkStatus();
    }
    if (health.ok()) {
      last = HealthName(*health);
    } else if (!absl::IsDeadlineExceeded(health.status()) || last == "no answer") {
      last = health.status().ToString();
    }
    absl::SleepFor(std::clamp(deadline - absl::Now(), absl::ZeroDuration(), absl::Milliseconds(20)));
  } while (absl::Now() < deadline);
  return absl::DeadlineExceededError(absl::StrCat(
      address, " is not serving after ", absl::FormatDuration(patience), "; the last answer was ", last));
}

bool Answers(grpc::Channel& channel, absl::Duration patience) {
  grpc::GenericStub stub(std::shared_ptr<grpc::ChannelInterface>(std::shared_ptr<void>(), &channel));
  const absl::StatusOr<int> health = CheckHealth(stub, absl::Now() + patience, true);
  return health.ok() || (!absl::IsDeadlineExceeded(health.status()) && !absl::IsUnavailable(health.status()));
}

absl::Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  // The two enumerations are both google.rpc.Code.
  return absl::Status(static_cast<absl::StatusCode>(static_cast<int>(status.error_code())),
                      status.error_message());
}

grpc::Status ToGrpc(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  return grpc::Status(static_cast<grpc::StatusCode>(static_cast<int>(status.code())),
                      std::string(status.message()));
}

int HttpStatusOf(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kOk:
      return 200;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kOutOfRange:
      return 400;
    case absl::StatusCode::kUnauthenticated:
      return 401;
    case absl::StatusCode::kPermissionDenied:
      return 403;
    case absl::StatusCode::kNotFound:
      return 404;
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kAlreadyExists:
      return 409;
    case absl::StatusCode::kResourceExhausted:
      return 429;
    case absl::StatusCode::kCancelled:
      return 499;  // the client has gone; nobody reads it
    case absl::StatusCode::kUnimplemented:
      return 501;
    case absl::StatusCode::kUnavailable:
      return 503;
    case absl::StatusCode::kDeadlineExceeded:
      return 504;
    default:
      return 500;
  }
}

}  // namespace tandem::rpc
