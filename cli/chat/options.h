// What `tandem chat` was asked for.
#pragma once

#include <cstdint>
#include <string>

#include "cli/flags/command_line.h"

namespace tandem::cli {

struct ChatOptions {
  std::string url;     // empty: the default address if somebody answers there, else a server of our own
  std::string model;   // a file: always a server of our own
  std::string prompt;  // one question, then the end
  std::string system;
  double temperature = -1;  // below 0: the server's default
  double top_p = -1;
  int64_t seed = -1;
  int64_t max_tokens = 0;  // 0: what the context leaves
  std::string api_key;
  bool probe = false;  // only tell by the exit code whether a server is ready
  bool think_display = true;
  double timeout = 600;  // seconds without a byte from the server
};

void AddChatFlags(Command& command, ChatOptions* options);

// The exit code: 0, 1 where the server or the request failed, 130 where Ctrl-C ended a single question.
int RunChat(const ChatOptions& options);

}  // namespace tandem::cli
