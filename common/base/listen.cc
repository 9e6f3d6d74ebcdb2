#include "common/base/listen.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstring>
#include <memory>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"

namespace tandem {
namespace {

struct AddrInfoDeleter {
  void operator()(addrinfo* info) const { freeaddrinfo(info); }
};
using AddrInfo = std::unique_ptr<addrinfo, AddrInfoDeleter>;

absl::StatusOr<AddrInfo> Resolve(const HostPort& at, const std::string& address) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const std::string port = std::to_string(at.port);
  if (const int error = getaddrinfo(at.host.c_str(), port.c_str(), &hints, &found); error != 0) {
    return absl::NotFoundError(absl::StrCat("cannot listen at ", address, ": host \"", at.host,
                                            "\" is not known (", gai_strerror(error), ")"));
  }
  return AddrInfo(found);
}

// errno of a trial bind; 0: it worked.
int TryBind(const addrinfo& info) {
  const int fd = socket(info.ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return errno;
  const int on = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  const int error = bind(fd, info.ai_addr, info.ai_addrlen) == 0 ? 0 : errno;
  close(fd);
  return error;
}

}  // namespace

bool HostPort::IsWildcard() const { return host == "0.0.0.0" || host == "::"; }

std::string HostPort::ToString() const {
  return host.find(':') == std::string::npos ? absl::StrCat(host, ":", port)
                                             : absl::StrCat("[", host, "]:", port);
}

absl::StatusOr<HostPort> ParseHostPort(const std::string& address) {
  const auto bad = [&](const char* why) {
    return absl::InvalidArgumentError(absl::StrCat("address \"", address, "\" ", why));
  };
  const size_t colon = address.rfind(':');
  if (colon == std::string::npos) return bad("has no port: write HOST:PORT");
  HostPort out;
  out.host = address.substr(0, colon);
  if (out.host.size() >= 2 && out.host.front() == '[' && out.host.back() == ']') {
    out.host = out.host.substr(1, out.host.size() - 2);
  } else if (out.host.find(':') != std::string::npos) {
    return bad("is ambiguous: write IPv6 addresses as [ADDRESS]:PORT");
  }
  if (out.host.empty()) return bad("has no host: write 0.0.0.0:PORT or [::]:PORT for all of this machine's");
  const char* first = address.data() + colon + 1;
  const char* last = address.data() + address.size();
  const auto [end, error] = std::from_chars(first, last, out.port);
  if (error != std::errc() || end != last || first == last || out.port < 0 || out.port > 65535) {
    return bad("has a port that is not a number from 0 to 65535");
  }
  return out;
}

absl::StatusOr<std::vector<HostPort>> ResolveListen(const std::string& address) {
  TANDEM_ASSIGN_OR_RETURN(const HostPort at, ParseHostPort(address));
  TANDEM_ASSIGN_OR_RETURN(const AddrInfo found, Resolve(at, address));
  std::vector<HostPort> out;
  for (const addrinfo* info = found.get(); info != nullptr; info = info->ai_next) {
    char host[INET6_ADDRSTRLEN] = {};
    const void* raw = nullptr;
    if (info->ai_family == AF_INET) {
      raw = &reinterpret_cast<const sockaddr_in*>(info->ai_addr)->sin_addr;
    } else if (info->ai_family == AF_INET6) {
      raw = &reinterpret_cast<const sockaddr_in6*>(info->ai_addr)->sin6_addr;
    }
    if (raw == nullptr || inet_ntop(info->ai_family, raw, host, sizeof host) == nullptr) continue;
    out.push_back({host, at.port});
  }
  return out;
}

absl::Status ProbeListen(const std::string& address) {
  TANDEM_ASSIGN_OR_RETURN(const HostPort at, ParseHostPort(address));
  TANDEM_ASSIGN_OR_RETURN(const AddrInfo found, Resolve(at, address));
  int error = 0;
  bool bound = false;
  for (const addrinfo* info = found.get(); info != nullptr; info = info->ai_next) {
    const int e = TryBind(*info);
    if (e == EADDRINUSE) {
      return absl::AlreadyExistsError(
          absl::StrCat("cannot listen at ", address, ": the port is in use by another program"));
    }
    if (e == 0) bound = true;
    if (e != 0) error = e;
  }
  if (bound) return absl::OkStatus();
  if (error == EACCES) {
    return absl::PermissionDeniedError(
        absl::StrCat("cannot listen at ", address, ": no permission for this port (below 1024?)"));
  }
  return absl::NotFoundError(absl::StrCat("cannot listen at ", address, ": ", std::strerror(error)));
}

void TouchTcp(const HostPort& at) {
  const auto found = Resolve(at, at.ToString());
  if (!found.ok()) return;
  const int fd = socket((*found)->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return;
  (void)!connect(fd, (*found)->ai_addr, (*found)->ai_addrlen);
  close(fd);
}

}  // namespace tandem
