#include "cli/serve/line_writer.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "absl/strings/str_cat.h"

namespace tandem::cli {
namespace {

constexpr std::chrono::seconds kFarewell{2};

// False: it cannot be written to any more.
bool WriteAll(int fd, const std::string& text) {
  for (size_t at = 0; at < text.size();) {
    const ssize_t n = write(fd, text.data() + at, text.size() - at);
    if (n >= 0) {
      at += static_cast<size_t>(n);
    } else if (errno == EAGAIN) {
      pollfd wait = {fd, POLLOUT, 0};
      poll(&wait, 1, -1);
    } else if (errno != EINTR) {
      return false;
    }
  }
  return true;
}

}  // namespace

LineWriter::LineWriter(int fd, size_t most_lines) : state_(std::make_shared<State>()) {
  state_->fd = fd;
  state_->most = most_lines;
  thread_ = std::thread([state = state_] { Run(*state); });
}

LineWriter::~LineWriter() {
  bool done;
  {
    std::unique_lock lock(state_->mutex);
    state_->ending = true;
    state_->changed.notify_all();
    done = state_->changed.wait_for(lock, kFarewell, [this] { return state_->done; });
  }
  if (done) {
    thread_.join();
  } else {
    thread_.detach();
  }
}

void LineWriter::Add(std::string line) {
  const std::lock_guard lock(state_->mutex);
  if (state_->lines.size() >= state_->most) {
    ++state_->lost;
    return;
  }
  state_->lines.push_back(std::move(line));
  state_->changed.notify_all();
}

void LineWriter::Run(State& state) {
  sigset_t pipe;  // a reader that is gone is an error of write, no more
  sigemptyset(&pipe);
  sigaddset(&pipe, SIGPIPE);
  pthread_sigmask(SIG_BLOCK, &pipe, nullptr);
  std::unique_lock lock(state.mutex);
  for (bool open = true;;) {
    state.changed.wait(lock, [&] { return !state.lines.empty() || state.ending; });
    if (state.lines.empty()) break;
    std::string text = std::move(state.lines.front());
    state.lines.pop_front();
    if (state.lines.empty() && state.lost > 0) {
      absl::StrAppend(&text, "\n(", std::exchange(state.lost, 0), " lines are lost: nobody read them)");
    }
    text += '\n';
    lock.unlock();
    open = open && WriteAll(state.fd, text);
    lock.lock();
  }
  state.done = true;
  state.changed.notify_all();
}

}  // namespace tandem::cli
