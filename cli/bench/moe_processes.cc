// Slices in processes of their own, which take calls from shared memory: they sleep on a futex between calls
// and write their partial answers beside each other.
#include <linux/futex.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <ctime>

#include "absl/strings/str_cat.h"
#include "cli/bench/moe_runner.h"
#include "cli/bench/moe_worker.h"
#include "cli/bench/util.h"
#include "common/base/status_macros.h"

namespace tandem::cli {
namespace {

enum class Order : int32_t { kForward, kRead, kStop };

// What the processes share; the arrays lie behind it.
struct Board {
  std::atomic<uint32_t> bell;  // counts orders
  std::atomic<uint32_t> done;  // processes that have carried out the last one
  Order order;
  int64_t layer;
  int64_t n_tokens;
  uint64_t read_bytes;  // of each process
  std::atomic<uint64_t> weight_bytes;
  std::atomic<uint64_t> resident_bytes;
  std::atomic<bool> failed;
  char error[512];  // of the first that failed
};
static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free);

void FutexWait(std::atomic<uint32_t>& word, uint32_t value) {
  const timespec patience = {1, 0};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, value, &patience, nullptr, 0);
}
void FutexWake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

class ProcessRunner final : public MoeRunner {
 public:
  ProcessRunner(const MoeRunnerOptions& options, int64_t slices)
      : options_(options),
        slices_(slices),
        k_(options.generate.config.num_experts_per_tok),
        hidden_(options.generate.config.hidden_size),
        answer_(static_cast<size_t>(options.max_tokens * hidden_)) {}

  ~ProcessRunner() override {
    if (board_ != nullptr && static_cast<int64_t>(children_.size()) == slices_) {
      board_->order = Order::kStop;
      board_->bell.fetch_add(1);
      FutexWake(board_->bell);
    }
    for (const pid_t child : children_) {
      if (static_cast<int64_t>(children_.size()) != slices_ || board_->failed) kill(child, SIGKILL);
      waitpid(child, nullptr, 0);
    }
    if (board_ != nullptr) munmap(board_, board_bytes_);
  }

  absl::Status Start() {
    const auto pairs = static_cast<uint64_t>(options_.max_tokens * k_);
    const auto values = static_cast<uint64_t>(options_.max_tokens * hidden_);
    const auto place = [this](uint64_t bytes) {
      const uint64_t at = board_bytes_;
      board_bytes_ += (bytes + 63) / 64 * 64;
      return at;
    };
    place(sizeof(Board));
    const uint64_t ids = place(pairs * sizeof(int32_t)), weights = place(pairs * sizeof(float));
    const uint64_t activations = place(values * sizeof(uint16_t));
    std::vector<uint64_t> parts;
    for (int64_t s = 0; s < slices_; ++s) parts.push_back(place(values * sizeof(double)));
    void* map = mmap(nullptr, board_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) {
      return absl::ResourceExhaustedError(absl::StrCat("no shared memory: ", std::strerror(errno)));
    }
    board_ = new (map) Board();
    auto* base = static_cast<uint8_t*>(map);
    ids_ = {reinterpret_cast<int32_t*>(base + ids), pairs};
    weights_ = {reinterpret_cast<float*>(base + weights), pairs};
    activations_ = {reinterpret_cast<uint16_t*>(base + activations), values};
    for (const uint64_t part : parts) parts_.push_back(reinterpret_cast<double*>(base + part));

    const pid_t parent = getpid();
    for (int64_t slice = 0; slice < slices_; ++slice) {
      const pid_t child = fork();
      if (child < 0) return absl::InternalError(absl::StrCat("fork fails: ", std::strerror(errno)));
      if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() == parent) Serve(slice);
        _exit(0);
      }
      children_.push_back(child);
    }
    return AwaitAll();  // each counts itself when its weights are there
  }

  std::span<int32_t> ids() override { return ids_; }
  std::span<float> weights() override { return weights_; }
  std::span<uint16_t> activations() override { return activations_; }
  std::span<const float> answer() override { return answer_; }
  uint64_t resident_bytes() const override { return board_->resident_bytes; }

  absl::StatusOr<Result> Forward(const MoeCall& call) override {
    const Stopwatch watch;
    board_->layer = call.layer;
    board_->n_tokens = call.n_tokens;
    board_->weight_bytes = 0;
    TANDEM_RETURN_IF_ERROR(Give(Order::kForward));
    const auto values = static_cast<size_t>(call.n_tokens * hidden_);
    if (slices_ == 1) {
      std::memcpy(answer_.data(), parts_[0], values * sizeof(float));
    } else {
      for (size_t i = 0; i < values; ++i) {
        double sum = 0;
        for (const double* part : parts_) sum += part[i];
        answer_[i] = static_cast<float>(sum);
      }
    }
    return Result{watch.Seconds(), static_cast<double>(board_->weight_bytes)};
  }

  absl::StatusOr<double> Read(uint64_t bytes) override {
    bytes = std::min(bytes, resident_bytes()) / static_cast<uint64_t>(slices_);
    board_->read_bytes = bytes;
    const Stopwatch watch;
    TANDEM_RETURN_IF_ERROR(Give(Order::kRead));
    return static_cast<double>(bytes) * static_cast<double>(slices_) / watch.Seconds();
  }

 private:
  absl::Status Give(Order order) {
    board_->order = order;
    board_->done.store(0, std::memory_order_relaxed);
    board_->bell.fetch_add(1, std::memory_order_release);
    FutexWake(board_->bell);
    return AwaitAll();
  }

  // This process sleeps meanwhile: the cores are the slices'.
  absl::Status AwaitAll() {
    while (true) {
      const uint32_t done = board_->done.load(std::memory_order_acquire);
      if (board_->failed) return absl::InternalError(board_->error);
      if (static_cast<int64_t>(done) == slices_) return absl::OkStatus();
      FutexWait(board_->done, done);
      for (const pid_t child : children_) {
        siginfo_t info = {};
        if (waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOHANG | WNOWAIT) == 0 &&
            info.si_pid != 0 && !board_->failed) {
          std::strncpy(board_->error, "a process of the group died", sizeof board_->error - 1);
          board_->failed = true;
        }
      }
    }
  }

  // In the child.
  void Fail(const absl::Status& status) {
    std::strncpy(board_->error, std::string(status.message()).c_str(), sizeof board_->error - 1);
    board_->failed = true;
    Done();
  }
  void Done() {
    board_->done.fetch_add(1, std::memory_order_release);
    FutexWake(board_->done);
  }

  void Serve(int64_t slice) {
    MoeRunnerOptions own = options_;
    const auto cpus = static_cast<int64_t>(options_.cpus.size());
    own.cpus.assign(options_.cpus.begin() + cpus * slice / slices_,
                    options_.cpus.begin() + cpus * (slice + 1) / slices_);
    expert::ShardRequest request;
    request.slice_index = slice;
    request.slice_count = slices_;
    uint32_t heard = board_->bell.load();
    const auto worker = MoeWorker::Make(own, request);
    if (!worker.ok()) return Fail(worker.status());
    board_->resident_bytes += (*worker)->shard().resident_bytes();
    Done();
    while (true) {
      while (board_->bell.load(std::memory_order_acquire) == heard) FutexWait(board_->bell, heard);
      ++heard;
      if (board_->order == Order::kStop) return;
      if (board_->order == Order::kRead) {
        (*worker)->Read(board_->read_bytes);
      } else if (const absl::Status status = Compute(**worker, slice); !status.ok()) {
        return Fail(status);
      }
      Done();
    }
  }

  absl::Status Compute(MoeWorker& worker, int64_t slice) {
    expert::Call c;
    c.layer = board_->layer;
    c.n_tokens = board_->n_tokens;
    c.experts_per_token = k_;
    const auto pairs = static_cast<size_t>(c.n_tokens * k_);
    const auto bytes = [](const auto* data, size_t n) {
      return std::span(reinterpret_cast<const uint8_t*>(data), n * sizeof *data);
    };
    c.expert_ids = bytes(ids_.data(), pairs);
    c.expert_weights = bytes(weights_.data(), pairs);
    c.activations = bytes(activations_.data(), static_cast<size_t>(c.n_tokens * hidden_));
    c.activation_type = expert::ActivationType::kBf16;
    c.bulk = options_.bulk;
    c.answer_type = slices_ == 1 ? expert::AnswerType::kF32 : expert::AnswerType::kF64;
    auto* out = reinterpret_cast<uint8_t*>(parts_[static_cast<size_t>(slice)]);
    TANDEM_ASSIGN_OR_RETURN(
        const expert::CallStatistics statistics,
        worker.moe().Forward(c, {out, worker.moe().AnswerBytes(c.n_tokens, c.answer_type)}));
    board_->weight_bytes += statistics.weight_bytes_read;
    return absl::OkStatus();
  }

  const MoeRunnerOptions options_;
  const int64_t slices_, k_, hidden_;
  std::vector<float> answer_;
  Board* board_ = nullptr;
  uint64_t board_bytes_ = 0;
  std::span<int32_t> ids_;
  std::span<float> weights_;
  std::span<uint16_t> activations_;
  std::vector<double*> parts_;  // a slice each
  std::vector<pid_t> children_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<MoeRunner>> MakeProcessRunner(const MoeRunnerOptions& options,
                                                             int64_t slices) {
  if (static_cast<int64_t>(options.cpus.size()) < slices) {
    return absl::InvalidArgumentError(
        absl::StrCat("--slices ", slices, ": there are ", options.cpus.size(), " threads to share out"));
  }
  auto runner = std::make_unique<ProcessRunner>(options, slices);
  TANDEM_RETURN_IF_ERROR(runner->Start());
  return std::unique_ptr<MoeRunner>(std::move(runner));
}

}  // namespace tandem::cli
