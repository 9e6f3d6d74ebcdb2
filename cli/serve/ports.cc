#include "cli/serve/ports.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "common/base/listen.h"
#include "common/base/status_macros.h"

namespace tandem::cli {
namespace {

// Inodes of the sockets that listen at `port`, from a table of /proc/net/tcp's form.
void AddListeners(const char* table, int port, std::set<std::string>& inodes) {
  std::ifstream file(table);
  std::string line;
  std::getline(file, line);  // the header
  while (std::getline(file, line)) {
    // "0: 0100007F:2712 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 12345 ..."
    std::istringstream words(line);
    std::string slot, local, remote, state, queues, timer, retransmits, uid, timeout, inode;
    words >> slot >> local >> remote >> state >> queues >> timer >> retransmits >> uid >> timeout >> inode;
    constexpr const char* kListen = "0A";
    unsigned found = 0;
    const size_t colon = local.rfind(':');
    if (colon == std::string::npos || state != kListen) continue;
    if (std::sscanf(local.c_str() + colon + 1, "%x", &found) == 1 && static_cast<int>(found) == port) {
      inodes.insert("socket:[" + inode + "]");
    }
  }
}

bool HoldsOneOf(const std::string& process, const std::set<std::string>& inodes) {
  const std::string folder = process + "/fd";
  DIR* dir = opendir(folder.c_str());
  if (dir == nullptr) return false;
  bool found = false;
  while (const dirent* entry = found ? nullptr : readdir(dir)) {
    char target[64];
    const ssize_t n = readlink((folder + "/" + entry->d_name).c_str(), target, sizeof target);
    found = n > 0 && inodes.contains(std::string(target, static_cast<size_t>(n)));
  }
  closedir(dir);
  return found;
}

}  // namespace

std::string PortOwner(int port) {
  std::set<std::string> inodes;
  AddListeners("/proc/net/tcp", port, inodes);
  AddListeners("/proc/net/tcp6", port, inodes);
  DIR* dir = inodes.empty() ? nullptr : opendir("/proc");
  if (dir == nullptr) return "";
  std::string owner;
  while (const dirent* entry = owner.empty() ? readdir(dir) : nullptr) {
    const std::string pid = entry->d_name;
    if (!std::all_of(pid.begin(), pid.end(), [](unsigned char c) { return std::isdigit(c) != 0; })) continue;
    if (!HoldsOneOf("/proc/" + pid, inodes)) continue;
    std::ifstream comm("/proc/" + pid + "/comm");
    std::string name;
    std::getline(comm, name);
    owner = absl::StrCat(name, " (pid ", pid, ")");
  }
  closedir(dir);
  return owner;
}

absl::Status CheckPort(const std::string& host, int port, const std::string& flag) {
  const absl::Status probe = ProbeListen(HostPort{host, port}.ToString());
  // No such name, or not an address of this machine: no port would help.
  const bool host_is_wrong = absl::IsNotFound(probe) || absl::IsInvalidArgument(probe);
  if (!absl::IsAlreadyExists(probe)) return Annotate(probe, host_is_wrong ? "--host" : flag);
  const std::string owner = PortOwner(port);
  return absl::AlreadyExistsError(absl::StrCat("port ", port, " is in use", owner.empty() ? "" : " by ",
                                               owner, ": stop that, or choose another with ", flag,
                                               " (0 takes a free one)"));
}

absl::StatusOr<int> FreePort(const std::string& host, const std::vector<int>& taken) {
  TANDEM_ASSIGN_OR_RETURN(const std::vector<HostPort> addresses, ResolveListen(HostPort{host, 0}.ToString()));
  for (int attempt = 0; attempt < 100; ++attempt) {
    const bool v6 = !addresses.empty() && addresses.front().host.find(':') != std::string::npos;
    const int fd = socket(v6 ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return absl::InternalError(absl::StrCat("socket: ", std::strerror(errno)));
    sockaddr_storage address{};
    socklen_t size = 0;
    if (v6) {
      auto* in6 = reinterpret_cast<sockaddr_in6*>(&address);
      in6->sin6_family = AF_INET6;
      inet_pton(AF_INET6, addresses.front().host.c_str(), &in6->sin6_addr);
      size = sizeof *in6;
    } else {
      auto* in = reinterpret_cast<sockaddr_in*>(&address);
      in->sin_family = AF_INET;
      if (!addresses.empty()) inet_pton(AF_INET, addresses.front().host.c_str(), &in->sin_addr);
      size = sizeof *in;
    }
    const bool bound = bind(fd, reinterpret_cast<sockaddr*>(&address), size) == 0 &&
                       getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) == 0;
    const int error = errno;
    close(fd);
    if (!bound)
      return absl::InternalError(absl::StrCat("no free port of ", host, ": ", std::strerror(error)));
    const int port = ntohs(v6 ? reinterpret_cast<sockaddr_in6*>(&address)->sin6_port
                              : reinterpret_cast<sockaddr_in*>(&address)->sin_port);
    if (std::find(taken.begin(), taken.end(), port) == taken.end()) return port;
  }
  return absl::ResourceExhaustedError(absl::StrCat("no free port of ", host));
}

}  // namespace tandem::cli
