#include "services/attention_gpu/experts/expert_watch.h"

#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status_macros.h"
#include "common/rpc/channel.h"

namespace tandem::attention {

struct ExpertWatch::Impl {
  explicit Impl(Options o) : options(std::move(o)), lost(options.addresses.size()) {}

  void Watch(size_t i) {
    int misses = 0;
    while (true) {
      const std::string& address = options.addresses[i];
      const absl::Status status = rpc::WaitServing(*channels[i], address, options.check);
      misses = status.ok() ? 0 : misses + 1;
      std::string now;
      if (misses >= options.misses) now = absl::StrCat("expert process ", status.message());
      std::unique_lock lock(mutex);
      if (stopping) return;
      // The words of an answer may differ from one to the next: only lost or not is a change.
      const bool changed = now.empty() != lost[i].empty();
      if (changed) lost[i] = std::move(now);
      lock.unlock();
      if (changed) options.on_change();
      lock.lock();
      if (misses == 0)
        wake.wait_for(lock, absl::ToChronoMilliseconds(options.period), [this] { return stopping; });
      if (stopping) return;
    }
  }

  const Options options;
  std::vector<std::shared_ptr<grpc::Channel>> channels;
  mutable std::mutex mutex;
  std::condition_variable wake;
  bool stopping = false;
  std::vector<std::string> lost;  // why, for each process; empty: it serves
  std::vector<std::thread> threads;
};

ExpertWatch::ExpertWatch(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

absl::StatusOr<std::unique_ptr<ExpertWatch>> ExpertWatch::Start(Options options) {
  auto impl = std::make_unique<Impl>(std::move(options));
  for (const std::string& address : impl->options.addresses) {
    TANDEM_ASSIGN_OR_RETURN(std::shared_ptr<grpc::Channel> channel, rpc::Connect(address, impl->options.tls));
    impl->channels.push_back(std::move(channel));
  }
  for (size_t i = 0; i < impl->channels.size(); ++i) {
    impl->threads.emplace_back([raw = impl.get(), i] { raw->Watch(i); });
  }
  return std::unique_ptr<ExpertWatch>(new ExpertWatch(std::move(impl)));
}

ExpertWatch::~ExpertWatch() {
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->stopping = true;
  }
  impl_->wake.notify_all();
  for (std::thread& thread : impl_->threads) thread.join();
}

std::string ExpertWatch::lost() const {
  const std::lock_guard lock(impl_->mutex);
  std::vector<std::string> reasons;
  for (const std::string& why : impl_->lost) {
    if (!why.empty()) reasons.push_back(why);
  }
  return absl::StrJoin(reasons, "; ");
}

}  // namespace tandem::attention
