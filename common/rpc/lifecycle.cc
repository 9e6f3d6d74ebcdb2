#include "common/rpc/lifecycle.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "common/base/check.h"

namespace tandem::rpc {

namespace {
constexpr std::chrono::seconds kSameStop{2};
}  // namespace

void PrepareProcess() {
  for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; ++fd) {
    // The lowest number that is free is this one: those before it are open by now.
    if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) < 0) break;
  }
  rlimit files;
  if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < files.rlim_max) {
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
  }
}

struct StopSignal::Impl {
  std::mutex mutex;
  std::condition_variable changed;
  std::atomic<int> first{0};
  std::atomic<bool> ending{false};
  std::chrono::steady_clock::time_point at;  // the first; the waiter's
  sigset_t set;
  std::thread waiter;

  void Loop() {
    while (true) {
      int signal = 0;
      if (sigwait(&set, &signal) != 0) continue;
      if (ending.load()) return;
      const std::lock_guard lock(mutex);
      const auto now = std::chrono::steady_clock::now();
      if (first.load() == SIGTERM && signal == SIGTERM && now - at < kSameStop) continue;
      if (first.load() != 0) _exit(128 + signal);
      first.store(signal);
      at = now;
      changed.notify_all();
    }
  }
};

StopSignal::StopSignal() : impl_(std::make_unique<Impl>()) {
  signal(SIGPIPE, SIG_IGN);
  sigemptyset(&impl_->set);
  sigaddset(&impl_->set, SIGINT);
  sigaddset(&impl_->set, SIGTERM);
  TANDEM_CHECK(pthread_sigmask(SIG_BLOCK, &impl_->set, nullptr) == 0);
  impl_->waiter = std::thread([this] { impl_->Loop(); });
}

StopSignal::~StopSignal() {
  impl_->ending.store(true);
  pthread_kill(impl_->waiter.native_handle(), SIGTERM);  // only to wake it
  impl_->waiter.join();
}

int StopSignal::Wait() {
  std::unique_lock lock(impl_->mutex);
  impl_->changed.wait(lock, [this] { return impl_->first.load() != 0; });
  return impl_->first.load();
}

std::optional<int> StopSignal::WaitFor(absl::Duration d) {
  std::unique_lock lock(impl_->mutex);
  if (!impl_->changed.wait_for(lock, absl::ToChronoNanoseconds(d),
                               [this] { return impl_->first.load() != 0; })) {
    return std::nullopt;
  }
  return impl_->first.load();
}

bool StopSignal::Received() const { return impl_->first.load(std::memory_order_relaxed) != 0; }

}  // namespace tandem::rpc
