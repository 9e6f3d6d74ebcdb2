// Stand-ins for expert processes in this process: threads that answer what a GPU asks through shared memory.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/shm/call_client.h"
#include "common/shm/call_host.h"
#include "common/shm/memory.h"
#include "services/attention_gpu/experts/device_calls.h"

namespace tandem::attention::cuda::testing {

// Answers the call of process `index`: fills call.output, or says what is wrong.
using AnswerCall = std::function<absl::Status(const shm::IncomingCall& call, size_t index)>;

// One process's side: a region and a thread that answers.
class Peer {
 public:
  Peer(size_t index, const shm::RegionShape& shape, AnswerCall answer, uint64_t epoch)
      : index_(index), answer_(std::move(answer)), layout_(*shm::RegionLayout::Of(shape)) {
    memory_ = *shm::SharedMemory::Create("expert-stand-in", layout_.region_bytes());
    const shm::SessionId session{epoch, 0xfffffff0 + epoch};  // the flags wrap soon
    const shm::WaitPolicy policy{absl::Microseconds(100)};
    host_ = std::make_unique<shm::CallHost>(memory_.data(), layout_, session, policy);
    client_ = std::make_unique<shm::CallClient>(memory_.data(), layout_, session, policy);
    if (answer_ != nullptr) thread_ = std::thread([this] { Serve(); });
  }
  ~Peer() {
    host_->Stop();
    if (thread_.joinable()) thread_.join();
  }
  shm::CallClient& client() { return *client_; }
  std::atomic<int> stop_after{-1};  // answers no more after so many calls
  std::atomic<int> calls{0};

 private:
  void Serve() {
    for (;;) {
      shm::IncomingCall call;
      const absl::Status next = host_->Next(absl::Seconds(1), &call);
      if (absl::IsDeadlineExceeded(next)) continue;
      if (!next.ok()) return;
      if (stop_after >= 0 && calls >= stop_after) return;
      ++calls;
      const absl::Status status = call.valid.ok() ? answer_(call, index_) : call.valid;
      host_->Answer(call, status, {});
    }
  }

  const size_t index_;
  const AnswerCall answer_;
  shm::RegionLayout layout_;
  shm::SharedMemory memory_;
  std::unique_ptr<shm::CallHost> host_;
  std::unique_ptr<shm::CallClient> client_;
  std::thread thread_;
};

class Peers : public DeviceCalls {
 public:
  // Without `answer` they are silent.
  Peers(size_t count, const shm::RegionShape& shape, const AnswerCall& answer, bool float_input = false,
        uint64_t epoch = 1)
      : float_input_(float_input), shape_(shape) {
    for (size_t i = 0; i < count; ++i) peers_.push_back(std::make_unique<Peer>(i, shape, answer, epoch + i));
  }
  std::vector<DeviceRing> rings() const override {
    std::vector<DeviceRing> out;
    for (const auto& p : peers_) {
      out.push_back({p->client().region(), p->client().layout(), p->client().session().epoch});
    }
    return out;
  }
  int64_t max_tokens() const override { return shape_.max_rows; }
  shm::ValueType input_type() const override {
    return float_input_ ? shm::ValueType::kF32 : shm::ValueType::kBf16;
  }
  shm::ValueType output_type() const override {
    return peers_.size() > 1 ? shm::ValueType::kF64 : shm::ValueType::kF32;
  }
  absl::Duration call_timeout() const override { return timeout; }
  absl::StatusOr<std::vector<uint64_t>> BeginRun(uint64_t calls) override {
    first_.clear();
    for (const auto& p : peers_) {
      const auto first = p->client().BeginRun(calls);
      if (!first.ok()) return first.status();
      first_.push_back(*first);
    }
    return first_;
  }
  absl::Status EndRun(bool made_all, const absl::Status& why) override {
    absl::Status out;
    for (const auto& p : peers_) out.Update(p->client().EndRun(made_all, why));
    return out;
  }
  uint64_t Progress() const override {
    uint64_t sum = 0;
    for (const auto& p : peers_) sum += p->client().Answers();
    return sum;
  }
  absl::Status AnswerStatus(uint64_t index) override {
    return peers_[0]->client().AnswerStatus(first_[0] + index);
  }
  void Abort(const absl::Status& why) override {
    for (const auto& p : peers_) p->client().Abort(why);
  }
  Peer& operator[](size_t i) { return *peers_[i]; }

  absl::Duration timeout = absl::Seconds(20);

 private:
  const bool float_input_;
  const shm::RegionShape shape_;
  std::vector<std::unique_ptr<Peer>> peers_;
  std::vector<uint64_t> first_;
};

}  // namespace tandem::attention::cuda::testing
