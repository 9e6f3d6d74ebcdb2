#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "absl/strings/str_cat.h"
#include "cli/chat/options.h"
#include "cli/chat/own_server.h"
#include "cli/chat/stream.h"
#include "cli/util/format.h"
#include "cli/util/http_client.h"
#include "common/base/status_macros.h"

namespace tandem::cli {
namespace {

using std::chrono::milliseconds;

constexpr char kDefaultUrl[] = "http://127.0.0.1:10002";
constexpr milliseconds kProbePatience{1500};
constexpr milliseconds kConnectPatience{10000};
constexpr int kInterrupted = 130;

std::atomic<bool> interrupted = false;
int output_error = 0;  // errno of the first write to the standard output that failed; 0: none has

void OnInterrupt(int) { interrupted = true; }

// Sends out what is written so far. False once something could not be written: nobody sees the answers then.
bool FlushOutput() {
  const bool flushed = std::fflush(stdout) == 0 && std::ferror(stdout) == 0;
  if (!flushed && output_error == 0) output_error = errno == 0 ? EIO : errno;
  return output_error == 0;
}

// Text from a model may hold control characters; only line breaks and tabs reach the terminal.
std::string ForTerminal(const std::string& text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 ? byte != 0x7F : (c == '\n' || c == '\t')) out += c;
  }
  return out;
}

// Writes an answer as it comes, the reasoning dimmed on a terminal and between <think> tags elsewhere.
class Display {
 public:
  explicit Display(bool think_display) : tty_(isatty(STDOUT_FILENO) == 1), think_(think_display) {}

  void Show(AnswerStream::Part part, const std::string& text) {
    const bool reasoning = part == AnswerStream::Part::kReasoning;
    if (reasoning && !think_) return;
    if (reasoning && !in_reasoning_) Begin();
    if (!reasoning && in_reasoning_) End();
    std::string shown = ForTerminal(text);
    // The answer begins with the line breaks that part it from the reasoning; they are said already.
    if (!reasoning && !answer_begun_) shown.erase(0, std::min(shown.find_first_not_of('\n'), shown.size()));
    if (shown.empty()) return;
    if (!reasoning) answer_begun_ = true;
    std::fwrite(shown.data(), 1, shown.size(), stdout);
    if (!FlushOutput()) interrupted = true;  // the rest of the answer is for nobody
    at_line_start_ = shown.back() == '\n';
  }

  void Finish() {
    if (in_reasoning_) End();
    if (!at_line_start_) std::fputs("\n", stdout);
    FlushOutput();
    at_line_start_ = true;
    answer_begun_ = false;
  }

 private:
  void Begin() {
    in_reasoning_ = true;
    std::fputs(tty_ ? "\033[2m" : "<think>\n", stdout);
  }
  void End() {
    in_reasoning_ = false;
    if (!at_line_start_) std::fputs("\n", stdout);
    std::fputs(tty_ ? "\033[0m\n" : "</think>\n\n", stdout);
    at_line_start_ = true;
  }

  const bool tty_;
  const bool think_;
  bool in_reasoning_ = false;
  bool answer_begun_ = false;
  bool at_line_start_ = true;
};

class Session {
 public:
  Session(const ChatOptions& options, Url url)
      : options_(options), client_(std::move(url), &interrupted, options.api_key) {
    Reset();
  }

  // Asks which model is served; also tells whether the server can be used.
  absl::Status Connect() {
    TANDEM_ASSIGN_OR_RETURN(const HttpReply reply,
                            client_.Get("/v1/models", std::min(kConnectPatience, patience())));
    if (reply.status != 200) {
      return absl::UnavailableError(absl::StrCat("HTTP ", reply.status, ": ", ErrorMessage(reply.body)));
    }
    const auto list = nlohmann::json::parse(reply.body, nullptr, false);
    if (list.is_object() && list.contains("data") && list["data"].is_array() && !list["data"].empty() &&
        list["data"][0].is_object() && list["data"][0].contains("id") && list["data"][0]["id"].is_string()) {
      parameters_.model = list["data"][0]["id"].get<std::string>();
      return absl::OkStatus();
    }
    return absl::UnavailableError("the server does not say which model it has: is it Tandem?");
  }

  const std::string& model() const { return parameters_.model; }

  void Reset() {
    messages_.clear();
    if (!options_.system.empty()) messages_.push_back({"system", options_.system});
    parameters_.temperature = options_.temperature;
    parameters_.top_p = options_.top_p;
    parameters_.seed = options_.seed;
    parameters_.max_tokens = options_.max_tokens;
  }

  // One question and its answer. A failed one leaves the history as it was; a stopped one keeps what came.
  absl::Status Ask(const std::string& question) {
    messages_.push_back({"user", question});
    Display display(options_.think_display);
    AnswerStream stream([&](AnswerStream::Part part, const std::string& text) { display.Show(part, text); });
    const absl::StatusOr<HttpReply> reply =
        client_.Post("/v1/chat/completions", ChatRequest(messages_, parameters_), patience(),
                     [&](std::string_view piece) { stream.Feed(piece); });
    display.Finish();
    absl::Status status = reply.status();
    if (output_error != 0) {
      status = absl::DataLossError(absl::StrCat("cannot write the answer: ", std::strerror(output_error)));
    } else if (reply.ok() && reply->status != 200) {
      status = absl::UnavailableError(absl::StrCat("HTTP ", reply->status, ": ", ErrorMessage(reply->body)));
    } else if (!stream.error().empty()) {
      status = absl::UnavailableError(stream.error());
    } else if (reply.ok() && stream.finish_reason().empty()) {
      status = absl::UnavailableError("the server ended the answer half-way");
    }
    const bool keep = status.ok() || (absl::IsCancelled(status) && !stream.answer().empty());
    if (keep) {
      messages_.push_back({"assistant", stream.answer()});
    } else {
      messages_.pop_back();
    }
    if (status.ok()) {
      const bool tty = isatty(STDERR_FILENO) == 1;
      std::fprintf(stderr, "%s[%s%s]%s\n", tty ? "\033[2m" : "", stream.Speed().c_str(),
                   stream.finish_reason() == "length" ? "; cut at the token limit" : "",
                   tty ? "\033[0m" : "");
    }
    return status;
  }

 private:
  milliseconds patience() const { return milliseconds(static_cast<int64_t>(options_.timeout * 1000)); }

  const ChatOptions& options_;
  HttpClient client_;
  ChatParameters parameters_;
  std::vector<ChatMessage> messages_;
};

// Lines from standard input, interruptible.
class Input {
 public:
  enum class End { kLine, kInterrupted, kEof };

  End ReadLine(std::string* line) {
    while (true) {
      const size_t end = buffer_.find('\n');
      if (end != std::string::npos) {
        *line = buffer_.substr(0, end);
        buffer_.erase(0, end + 1);
        return End::kLine;
      }
      // Looks at the flag before each wait; the time-out covers a signal that comes between the two.
      if (interrupted.exchange(false)) return End::kInterrupted;
      pollfd in = {STDIN_FILENO, POLLIN, 0};
      if (poll(&in, 1, 200) <= 0) continue;
      char chunk[4096];
      const ssize_t n = read(STDIN_FILENO, chunk, sizeof chunk);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) {
        if (buffer_.empty()) return End::kEof;
        *line = std::move(buffer_);
        buffer_.clear();
        return End::kLine;
      }
      buffer_.append(chunk, static_cast<size_t>(n));
    }
  }

 private:
  std::string buffer_;
};

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "tandem chat: %s\n", std::string(status.message()).c_str());
  return absl::IsCancelled(status) ? kInterrupted : absl::IsInvalidArgument(status) ? 2 : 1;
}

// Ends when the input does, or where the output fails: without a reader there is nobody to answer.
int Interact(Session& session) {
  const bool tty = isatty(STDIN_FILENO) == 1;
  if (tty) {
    std::printf("%s. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.\n",
                Printable(session.model()).c_str());
  }
  Input input;
  std::string line;
  int code = 0;
  bool last_was_interrupt = false;
  while (true) {
    if (tty) std::printf("\n> ");
    if (!FlushOutput()) {
      return Fail(absl::DataLossError(absl::StrCat("cannot write: ", std::strerror(output_error))));
    }
    const Input::End end = input.ReadLine(&line);
    if (end == Input::End::kEof) break;
    if (end == Input::End::kInterrupted) {
      if (last_was_interrupt || !tty) return kInterrupted;
      std::printf("\n(once more, or /exit, to leave)");
      last_was_interrupt = true;
      continue;
    }
    last_was_interrupt = false;
    const size_t first = line.find_first_not_of(" \t\r");
    if (first == std::string::npos) continue;
    line = line.substr(first, line.find_last_not_of(" \t\r") - first + 1);
    if (line == "/exit" || line == "/quit") break;
    if (line == "/reset") {
      session.Reset();
      std::printf("(forgotten)\n");
      continue;
    }
    if (line == "/help") {
      std::printf("/reset forgets the conversation, /exit ends (Ctrl-D too), Ctrl-C stops an answer.\n");
      continue;
    }
    if (line.front() == '/' && line.find(' ') == std::string::npos) {
      std::printf("(no such command; /help lists them)\n");
      continue;
    }
    const absl::Status status = session.Ask(line);
    if (absl::IsCancelled(status)) {
      interrupted = false;
      if (!tty) return kInterrupted;
      std::printf("(stopped)\n");
    } else if (!status.ok()) {
      code = Fail(status);
      if (output_error != 0) return code;
      if (tty) code = 0;  // seen by the user, who may go on
    }
  }
  if (tty) std::printf("\n");
  return code;
}

bool Answers(const Url& url, const std::string& path) {
  const auto reply = HttpClient(url, &interrupted).Get(path, kProbePatience);
  return reply.ok() && reply->status == 200;
}

}  // namespace

void AddChatFlags(Command& command, ChatOptions* o) {
  command
      .Text("url", &o->url,
            "Address of the server (default: http://127.0.0.1:10002 if it runs, else one of our own)")
      .Text("model", &o->model, "Start a server of our own with this GGUF file or folder")
      .Text("prompt", &o->prompt, "Ask this one question (-p) and end")
      .NotFromEnvironment("model")
      .Short("prompt", 'p')
      .NotFromEnvironment("prompt")
      .Text("system", &o->system, "System prompt")
      .Number("temperature", &o->temperature, 0, 2, "0 is greedy (default: the server's)")
      .Number("top-p", &o->top_p, 0, 1, "Nucleus sampling (default: the server's)")
      .Integer("seed", &o->seed, 0, INT64_MAX, "Seed of the sampling")
      .Integer("max-tokens", &o->max_tokens, 1, 1 << 24, "Longest answer in tokens, thinking included")
      .Text("api-key", &o->api_key, "Key that the server asks for (better given as TANDEM_API_KEY)")
      .Switch("probe", &o->probe, "Ask nothing: the exit code is 0 if the server is ready, else 1")
      .Switch("think-display", &o->think_display, "Show the thinking (default true)")
      .Number("timeout", &o->timeout, 1, 86400,
              "Seconds to wait without hearing from the server (default 600)");
}

int RunChat(const ChatOptions& options) {
  struct sigaction action {};
  action.sa_handler = OnInterrupt;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  signal(SIGPIPE, SIG_IGN);

  absl::StatusOr<Url> url = ParseApiUrl(options.url.empty() ? kDefaultUrl : options.url);
  if (!url.ok()) return Fail(url.status());
  if (!options.url.empty() && !options.model.empty()) {
    return Fail(absl::InvalidArgumentError(
        "--url names a running server, --model starts one: give only one of them"));
  }
  if (options.probe) return Answers(*url, "/ready") ? 0 : 1;
  std::unique_ptr<OwnServer> own;
  if (!options.model.empty() || (options.url.empty() && !Answers(*url, "/health"))) {
    std::fprintf(stderr, "Starting a server of our own%s ...\n",
                 options.model.empty() ? absl::StrCat(", none answers at ", url->ToString()).c_str() : "");
    absl::StatusOr<std::unique_ptr<OwnServer>> started = OwnServer::Start(options.model, interrupted);
    if (!started.ok()) return Fail(started.status());
    own = std::move(started).value();
    url = ParseUrl(own->url());
  }
  Session session(options, *url);
  if (const absl::Status status = session.Connect(); !status.ok()) return Fail(status);
  if (options.prompt.empty()) return Interact(session);
  const absl::Status status = session.Ask(options.prompt);
  return status.ok() ? 0 : Fail(status);
}

}  // namespace tandem::cli
