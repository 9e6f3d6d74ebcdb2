#include "cli/chat/own_server.h"

#include <chrono>
#include <deque>
#include <mutex>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "cli/serve/ports.h"
#include "cli/serve/supervisor.h"
#include "cli/util/http_client.h"
#include "cli/util/paths.h"
#include "common/base/status_macros.h"

namespace tandem::cli {
namespace {

constexpr size_t kKeptLines = 8;
constexpr std::chrono::milliseconds kPoll{100};

}  // namespace

struct OwnServer::Impl {
  std::string url;
  std::mutex mutex;
  std::deque<std::string> lines;  // guarded by mutex
  std::atomic<bool> ready = false;
  std::atomic<bool> ended = false;
  std::unique_ptr<Supervisor> supervisor;
  std::thread thread;

  ~Impl() {
    if (thread.joinable()) {
      supervisor->RequestStop();
      thread.join();
    }
  }
};

OwnServer::OwnServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
OwnServer::~OwnServer() = default;
const std::string& OwnServer::url() const { return impl_->url; }

absl::StatusOr<std::unique_ptr<OwnServer>> OwnServer::Start(const std::string& model,
                                                            const std::atomic<bool>& stop) {
  auto impl = std::make_unique<Impl>();
  TANDEM_ASSIGN_OR_RETURN(const int port, FreePort("127.0.0.1", {}));
  impl->url = absl::StrCat("http://127.0.0.1:", port);
  TANDEM_ASSIGN_OR_RETURN(const Url url, ParseUrl(impl->url));

  Impl* const state = impl.get();
  Supervisor::Options options;
  options.attempts = 1;
  options.stop_patience = std::chrono::seconds(60);
  options.on_line = [state](const std::string&, const std::string& line) {
    const std::lock_guard lock(state->mutex);
    state->lines.push_back(line);
    if (state->lines.size() > kKeptLines) state->lines.pop_front();
  };
  options.on_all_ready = [state] { state->ready = true; };
  impl->supervisor = std::make_unique<Supervisor>(options);
  std::vector<std::string> argv = {ProgramFolder() + "/tandem",   "serve",         "--host=127.0.0.1",
                                   absl::StrCat("--port=", port), "--grpc-port=0", "--metrics-base-port=0"};
  if (!model.empty()) argv.push_back("--model=" + model);
  impl->supervisor->Add({.name = "server", .argv = argv, .ready = [url] {
                           const auto reply = HttpClient(url).Get("/ready", std::chrono::milliseconds(500));
                           return reply.ok() && reply->status == 200;
                         }});
  impl->thread = std::thread([state] {
    state->supervisor->Run();
    state->ended = true;
  });
  while (!impl->ready && !impl->ended && !stop) std::this_thread::sleep_for(kPoll);
  if (impl->ready) return std::unique_ptr<OwnServer>(new OwnServer(std::move(impl)));
  if (stop) return absl::CancelledError("interrupted while the server was starting");
  const std::lock_guard lock(impl->mutex);
  return absl::UnavailableError(
      absl::StrCat("the server did not start. It said:\n  ", absl::StrJoin(impl->lines, "\n  ")));
}

}  // namespace tandem::cli
