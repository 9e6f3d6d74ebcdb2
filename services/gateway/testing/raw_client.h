// A TCP client for tests that says exactly the bytes it is told and reads exactly the bytes it is sent.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <map>
#include <string>
#include <string_view>

namespace tandem::gateway::testing {

// Long enough for a slow machine under a sanitizer; only a test that fails waits so long.
inline constexpr std::chrono::milliseconds kPatience{60'000};

struct HttpReply {
  int status = 0;
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;                            // chunks joined
  bool complete = false;
};

class RawClient {
 public:
  explicit RawClient(int port, int receive_buffer = 0) {
    fd_ = socket(AF_INET, SOCK_STREAM, 0);
    if (receive_buffer > 0) setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof(receive_buffer));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connected_ = connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
  }
  ~RawClient() { Close(); }
  RawClient(const RawClient&) = delete;

  bool connected() const { return connected_; }
  void Close() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }
  void HalfClose() { shutdown(fd_, SHUT_WR); }

  bool Send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t n = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n <= 0) return false;
      bytes.remove_prefix(static_cast<size_t>(n));
    }
    return true;
  }

  // Until the end of the connection, or no byte for `quiet`.
  std::string ReadAll(std::chrono::milliseconds quiet = kPatience) {
    while (Fill(quiet)) {
    }
    std::string all;
    all.swap(input_);
    return all;
  }
  bool closed() const { return eof_; }

  // Waits for `text` in what has been received and not been taken yet; takes everything up to its end.
  std::string ReadUntil(std::string_view text, std::chrono::milliseconds quiet = kPatience) {
    size_t at;
    while ((at = input_.find(text)) == std::string::npos) {
      if (!Fill(quiet)) return {};
    }
    std::string out = input_.substr(0, at + text.size());
    input_.erase(0, at + text.size());
    return out;
  }

  HttpReply ReadReply(bool head_request = false) {
    HttpReply reply;
    const std::string head = ReadUntil("\r\n\r\n");
    if (head.size() < 12) return reply;
    reply.status = std::atoi(head.c_str() + 9);
    size_t at = head.find("\r\n") + 2;
    while (at < head.size() - 2) {
      const size_t end = head.find("\r\n", at);
      const size_t colon = head.find(':', at);
      if (colon == std::string::npos || colon > end) break;
      std::string name = head.substr(at, colon - at);
      for (char& c : name) c = static_cast<char>(tolower(c));
      reply.headers[name] = head.substr(colon + 2, end - colon - 2);
      at = end + 2;
    }
    if (head_request || reply.status == 204) {
      reply.complete = true;
    } else if (reply.headers.count("transfer-encoding") != 0) {
      while (true) {
        const std::string line = ReadUntil("\r\n");
        if (line.empty()) return reply;
        const size_t size = std::strtoul(line.c_str(), nullptr, 16);
        const std::string chunk = ReadBytes(size + 2);
        if (chunk.size() != size + 2) return reply;
        if (size == 0) break;
        reply.body += chunk.substr(0, size);
      }
      reply.complete = true;
    } else if (const auto it = reply.headers.find("content-length"); it != reply.headers.end()) {
      const size_t size = std::strtoul(it->second.c_str(), nullptr, 10);
      reply.body = ReadBytes(size);
      reply.complete = reply.body.size() == size;
    } else {
      reply.body = ReadAll();
      reply.complete = true;
    }
    return reply;
  }

  std::string ReadBytes(size_t size) {
    while (input_.size() < size && Fill(kPatience)) {
    }
    std::string out = input_.substr(0, size);
    input_.erase(0, out.size());
    return out;
  }

 private:
  bool Fill(std::chrono::milliseconds quiet) {
    pollfd entry{fd_, POLLIN, 0};
    if (eof_ || poll(&entry, 1, static_cast<int>(quiet.count())) <= 0) return false;
    char chunk[65536];
    const ssize_t n = recv(fd_, chunk, sizeof(chunk), 0);
    if (n <= 0) {
      eof_ = true;
      return false;
    }
    input_.append(chunk, static_cast<size_t>(n));
    return true;
  }

  int fd_ = -1;
  bool connected_ = false;
  bool eof_ = false;
  std::string input_;
};

}  // namespace tandem::gateway::testing
