#include "services/attention_gpu/backend/cuda/weight_copier.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/base/status_macros.h"
#include "services/attention_gpu/backend/cuda/device.h"

namespace tandem::attention::cuda {
namespace {

using Memories = std::vector<std::span<const std::byte>>;

uint64_t TotalBytes(const Memories& memories) {
  uint64_t bytes = 0;
  for (const auto& m : memories) bytes += m.size();
  return bytes;
}

// The copies' stream, and an event for each of the last tickets.
class CopyStream {
 public:
  absl::Status Open() {
    TANDEM_RETURN_IF_ERROR(
        ToStatus(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream for weights"));
    for (cudaEvent_t& e : done_) {
      TANDEM_RETURN_IF_ERROR(ToStatus(cudaEventCreateWithFlags(&e, cudaEventDisableTiming), "an event"));
    }
    return absl::OkStatus();
  }
  ~CopyStream() {
    if (stream_ != nullptr) cudaStreamSynchronize(stream_);
    for (const cudaEvent_t e : done_) {
      if (e != nullptr) cudaEventDestroy(e);
    }
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  cudaStream_t get() const { return stream_; }
  absl::Status WaitFor(cudaEvent_t after) {
    if (after == nullptr) return absl::OkStatus();
    return ToStatus(cudaStreamWaitEvent(stream_, after, 0), "copying weights");
  }
  absl::Status Send(uint8_t* to, const void* from, uint64_t bytes) {
    return ToStatus(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "copying weights");
  }
  absl::Status Finish(uint64_t ticket) {
    return ToStatus(cudaEventRecord(Event(ticket), stream_), "copying weights");
  }
  absl::Status Await(uint64_t ticket, cudaStream_t stream) {
    return ToStatus(cudaStreamWaitEvent(stream, Event(ticket), 0), "waiting for weights");
  }

 private:
  cudaEvent_t Event(uint64_t ticket) const { return done_[ticket % WeightCopier::kMostAtOnce]; }
  cudaStream_t stream_ = nullptr;
  cudaEvent_t done_[WeightCopier::kMostAtOnce] = {};
};

// Memory that CUDA has made page-locked where it lies.
class DirectCopier final : public WeightCopier {
 public:
  ~DirectCopier() override {
    cudaStreamSynchronize(stream_.get());
    for (const auto& m : registered_) cudaHostUnregister(const_cast<std::byte*>(m.data()));
  }

  absl::Status Open(const Memories& memories) {
    TANDEM_RETURN_IF_ERROR(stream_.Open());
    int device = 0, read_only = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&read_only, cudaDevAttrHostRegisterReadOnlySupported, device);
    const absl::Time begin = absl::Now();
    for (const auto& m : memories) {
      void* data = const_cast<std::byte*>(m.data());
      cudaError_t e = cudaErrorNotSupported;
      if (read_only != 0) {
        e = cudaHostRegister(data, m.size(), cudaHostRegisterPortable | cudaHostRegisterReadOnly);
      }
      // Mappings that may be written to (not those of another process) need no such support.
      if (e != cudaSuccess) e = cudaHostRegister(data, m.size(), cudaHostRegisterPortable);
      if (e != cudaSuccess) {
        cudaGetLastError();  // is dealt with here
        return ToStatus(e, absl::StrFormat("page-locking %.1f GB%s", static_cast<double>(m.size()) / 1e9,
                                           read_only != 0 ? "" : " (no read-only mappings here)"));
      }
      registered_.push_back(m);
    }
    description_ = absl::StrFormat("straight from %.1f GB of page-locked memory (locked in %.1f s)",
                                   static_cast<double>(TotalBytes(memories)) / 1e9,
                                   absl::ToDoubleSeconds(absl::Now() - begin));
    return absl::OkStatus();
  }

  absl::StatusOr<uint64_t> Copy(std::vector<CopyPiece> pieces, cudaEvent_t after) override {
    TANDEM_RETURN_IF_ERROR(stream_.WaitFor(after));
    for (const CopyPiece& p : pieces) TANDEM_RETURN_IF_ERROR(stream_.Send(p.to, p.from, p.bytes));
    TANDEM_RETURN_IF_ERROR(stream_.Finish(next_));
    return next_++;
  }
  absl::Status Await(uint64_t ticket, cudaStream_t stream) override { return stream_.Await(ticket, stream); }
  std::string Description() const override { return description_; }

 private:
  CopyStream stream_;
  Memories registered_;
  std::string description_;
  uint64_t next_ = 0;
};

class StagingCopier final : public WeightCopier {
 public:
  explicit StagingCopier(std::string why) : why_(std::move(why)) {}
  ~StagingCopier() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    for (std::thread& t : threads_) t.join();
    cudaStreamSynchronize(stream_.get());
    for (Buffer& b : buffers_) {
      if (b.free != nullptr) cudaEventDestroy(b.free);
    }
  }

  absl::Status Open(const Options& options) {
    TANDEM_RETURN_IF_ERROR(stream_.Open());
    int threads = options.threads;
    if (threads <= 0) threads = std::clamp(static_cast<int>(std::thread::hardware_concurrency()) / 2, 1, 8);
    buffer_bytes_ = options.buffer_bytes;
    buffers_.resize(2 * static_cast<size_t>(threads));
    for (Buffer& b : buffers_) pinned_.Want(&b.data, static_cast<int64_t>(buffer_bytes_));
    TANDEM_RETURN_IF_ERROR(pinned_.Allocate("copying weights"));
    for (Buffer& b : buffers_) {
      TANDEM_RETURN_IF_ERROR(ToStatus(cudaEventCreateWithFlags(&b.free, cudaEventDisableTiming), "an event"));
    }
    int device = 0;
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaGetDevice(&device), "the GPU"));
    for (int i = 0; i < threads; ++i) {
      threads_.emplace_back([this, i, device] {
        cudaSetDevice(device);
        Work(static_cast<size_t>(i));
      });
    }
    return absl::OkStatus();
  }

  absl::StatusOr<uint64_t> Copy(std::vector<CopyPiece> pieces, cudaEvent_t after) override {
    std::deque<Job> jobs;
    for (const CopyPiece& p : pieces) {
      for (uint64_t at = 0; at < p.bytes; at += buffer_bytes_) {
        Job& job = jobs.emplace_back();
        job.piece = {p.from + at, p.to + at, std::min(buffer_bytes_, p.bytes - at)};
      }
    }
    if (jobs.empty()) jobs.emplace_back();
    jobs.front().after = after;
    const std::lock_guard lock(mutex_);
    jobs.back().last_of = next_;
    jobs.back().last = true;
    for (Job& job : jobs) jobs_.push_back(job);
    changed_.notify_all();
    return next_++;
  }

  // Waits until the copy is on its way: before that its event would be an older copy's.
  absl::Status Await(uint64_t ticket, cudaStream_t stream) override {
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return sent_ > ticket || !error_.ok(); });
      TANDEM_RETURN_IF_ERROR(error_);
    }
    return stream_.Await(ticket, stream);
  }

  std::string Description() const override {
    return absl::StrCat("through page-locked buffers, filled by ", threads_.size(), " threads (", why_, ")");
  }

 private:
  struct Buffer {
    uint8_t* data = nullptr;
    cudaEvent_t free = nullptr;  // what was in it has been copied
  };
  struct Job {
    CopyPiece piece;
    cudaEvent_t after = nullptr;
    bool last = false;  // of the ticket last_of
    uint64_t last_of = 0;
  };

  // Jobs are taken in order, filled side by side, and sent in order: a later copy may go to the same place.
  void Work(size_t index) {
    uint64_t round = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return stopping_ || (!jobs_.empty() && error_.ok()); });
      if (stopping_) return;
      const Job job = jobs_.front();
      jobs_.pop_front();
      const uint64_t turn = taken_++;
      lock.unlock();
      Buffer& buffer = buffers_[2 * index + round++ % 2];
      absl::Status status = ToStatus(cudaEventSynchronize(buffer.free), "copying weights");
      if (status.ok() && job.piece.bytes > 0) std::memcpy(buffer.data, job.piece.from, job.piece.bytes);
      lock.lock();
      changed_.wait(lock, [&] { return stopping_ || turn_ == turn || !error_.ok(); });
      if (stopping_) return;
      if (status.ok()) status = error_;
      if (status.ok()) status = Send(job, buffer);
      if (!status.ok() && error_.ok()) error_ = status;
      ++turn_;
      if (job.last) sent_ = job.last_of + 1;
      changed_.notify_all();
    }
  }

  absl::Status Send(const Job& job, const Buffer& buffer) {
    TANDEM_RETURN_IF_ERROR(stream_.WaitFor(job.after));
    if (job.piece.bytes > 0) {
      TANDEM_RETURN_IF_ERROR(stream_.Send(job.piece.to, buffer.data, job.piece.bytes));
    }
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaEventRecord(buffer.free, stream_.get()), "copying weights"));
    return job.last ? stream_.Finish(job.last_of) : absl::OkStatus();
  }

  const std::string why_;
  CopyStream stream_;
  Arena pinned_{Arena::Kind::kPinnedHost};
  std::vector<Buffer> buffers_;
  uint64_t buffer_bytes_ = 0;
  std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  uint64_t taken_ = 0;  // jobs that threads have begun
  uint64_t turn_ = 0;   // the job that is to be sent next
  uint64_t next_ = 0;   // ticket
  uint64_t sent_ = 0;   // tickets that are on their way
  absl::Status error_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<WeightCopier>> WeightCopier::Create(const Memories& memories,
                                                                   const Options& options) {
  std::string why = "as asked for";
  if (options.page_lock) {
    auto direct = std::make_unique<DirectCopier>();
    const absl::Status status = direct->Open(memories);
    if (status.ok()) return direct;
    why = std::string(status.message());
  }
  auto staging = std::make_unique<StagingCopier>(std::move(why));
  TANDEM_RETURN_IF_ERROR(staging->Open(options));
  return staging;
}

}  // namespace tandem::attention::cuda
