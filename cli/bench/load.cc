// How fast the expert process's loader brings a model's experts into memory, beside a plain read of the same
// files, past the page cache, with as many large requests in flight.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <thread>

#include "absl/strings/str_cat.h"
#include "cli/bench/util.h"
#include "cli/util/format.h"
#include "common/base/status_macros.h"
#include "common/gguf/gguf.h"
#include "services/expert_cpu/shard/shard.h"

namespace tandem::cli {
namespace {

constexpr uint64_t kRequest = 8 << 20;
constexpr uint64_t kDirectAlignment = 4096;
constexpr int64_t kDefaultPasses = 2;

absl::Status Unreadable(const std::string& path) {
  return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
}

// A file's pages leave the page cache, so that what is read next comes from the disk. Share of them that stay
// (another process may hold them).
absl::StatusOr<double> DropFromCache(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return Unreadable(path);
  fdatasync(fd);  // dirty pages would stay
  posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  const auto bytes = static_cast<size_t>(std::max<off_t>(1, lseek(fd, 0, SEEK_END)));
  double stayed = 0;
  void* map = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
  if (map != MAP_FAILED) {
    std::vector<unsigned char> pages((bytes + 4095) / 4096);
    if (mincore(map, bytes, pages.data()) == 0) {
      const auto resident = std::count_if(pages.begin(), pages.end(), [](unsigned char p) { return p & 1; });
      stayed = static_cast<double>(resident) / static_cast<double>(pages.size());
    }
    munmap(map, bytes);
  }
  close(fd);
  return stayed;
}

// Reads the first `bytes` of the files, taken one after another; seconds.
class PlainRead {
 public:
  PlainRead(const std::vector<std::string>& paths, uint64_t bytes) : left_(bytes) {
    for (const std::string& path : paths) Open(path);
  }
  ~PlainRead() {
    for (const Piece& piece : files_) close(piece.fd);
  }

  absl::StatusOr<double> Run(int64_t threads) {
    TANDEM_RETURN_IF_ERROR(status_);
    const Stopwatch watch;
    std::vector<std::thread> workers;
    for (int64_t t = 1; t < threads; ++t) workers.emplace_back([this] { Work(); });
    Work();
    for (std::thread& worker : workers) worker.join();
    TANDEM_RETURN_IF_ERROR(status_);
    return watch.Seconds();
  }

 private:
  struct Piece {
    int fd;
    uint64_t offset;
    uint64_t bytes;
  };

  void Open(const std::string& path) {
    int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    if (fd < 0 && errno == EINVAL) fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);  // no O_DIRECT here
    if (fd < 0) {
      if (status_.ok()) status_ = Unreadable(path);
      return;
    }
    files_.push_back({fd, 0, 0});
    const auto size = std::min(left_, static_cast<uint64_t>(std::max<off_t>(0, lseek(fd, 0, SEEK_END))));
    for (uint64_t at = 0; at < size; at += kRequest) {
      requests_.push_back({fd, at, std::min(kRequest, size - at)});
    }
    left_ -= size;
  }

  void Work() {
    void* buffer = nullptr;
    if (posix_memalign(&buffer, kDirectAlignment, kRequest) != 0) return;
    while (true) {
      const size_t i = next_.fetch_add(1);
      if (i >= requests_.size()) break;
      const Piece& piece = requests_[i];
      // Direct reads want whole sectors; the end of the file cuts the last one short.
      for (uint64_t done = 0; done < piece.bytes;) {
        const uint64_t want =
            (piece.bytes - done + kDirectAlignment - 1) / kDirectAlignment * kDirectAlignment;
        const ssize_t n = pread(piece.fd, buffer, want, static_cast<off_t>(piece.offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
          const std::lock_guard lock(mutex_);
          status_ = absl::DataLossError(absl::StrCat("reading fails: ", std::strerror(errno)));
          break;
        }
        done += static_cast<uint64_t>(n);
      }
    }
    std::free(buffer);
  }

  uint64_t left_;
  std::vector<Piece> files_;
  std::vector<Piece> requests_;
  std::atomic<size_t> next_{0};
  std::mutex mutex_;
  absl::Status status_;
};

}  // namespace

absl::Status BenchLoad(const BenchOptions& options, Report& report) {
  if (options.model.empty()) return absl::InvalidArgumentError("--model names the file to load");
  gguf::File::Options header_only;
  header_only.map_data = false;
  TANDEM_ASSIGN_OR_RETURN(const auto file, gguf::File::Open(options.model, header_only));
  const std::string machine = MachineName();
  std::vector<double> gbps, ceilings, ratios, seconds;
  double bytes = 0, stayed = 0;
  const int64_t passes = options.repeat > 0 ? options.repeat : kDefaultPasses;
  const auto drop = [&]() -> absl::Status {
    for (const std::string& path : file->paths()) {
      TANDEM_ASSIGN_OR_RETURN(const double share, DropFromCache(path));
      stayed = std::max(stayed, share);
    }
    return absl::OkStatus();
  };
  const auto load_shard = [&]() -> absl::Status {
    expert::LoadProgress progress;
    expert::LoadOptions load;
    load.threads = static_cast<int>(options.load_threads);
    load.progress = &progress;
    const Stopwatch watch;
    TANDEM_ASSIGN_OR_RETURN(const auto shard, expert::Shard::Load(options.model, load));
    seconds.push_back(watch.Seconds());
    bytes = static_cast<double>(progress.bytes_read);
    gbps.push_back(bytes / seconds.back() / 1e9);
    return absl::OkStatus();
  };
  const auto read_plainly = [&]() -> absl::Status {
    PlainRead read(file->paths(), file->file_bytes());
    TANDEM_ASSIGN_OR_RETURN(const double took, read.Run(options.load_threads));
    ceilings.push_back(static_cast<double>(file->file_bytes()) / took / 1e9);
    return absl::OkStatus();
  };
  // Each goes first in every other pass: a disk may have caches of its own, which the first one fills.
  for (int64_t pass = 0; pass < passes; ++pass) {
    TANDEM_RETURN_IF_ERROR(drop());
    TANDEM_RETURN_IF_ERROR(pass % 2 == 0 ? read_plainly() : load_shard());
    TANDEM_RETURN_IF_ERROR(drop());
    TANDEM_RETURN_IF_ERROR(pass % 2 == 0 ? load_shard() : read_plainly());
    ratios.push_back(gbps.back() / ceilings.back());
    report.Note(absl::StrCat("pass ", pass + 1, ": loader ", static_cast<int>(1000 * gbps.back()),
                             " MB/s, plain read ", static_cast<int>(1000 * ceilings.back()), " MB/s"));
  }
  if (stayed > 0.05) {
    report.Note(absl::StrCat("note: ", static_cast<int>(100 * stayed),
                             " % of a file stayed in the page cache: another process holds it"));
  }
  Measurement m;
  m.bench = "load";
  m.machine = machine;
  m.shape = std::filesystem::path(options.model).filename().string();
  m.threads = options.load_threads;
  m.bytes = bytes;
  m.seconds = Median(seconds);
  m.gbps = Median(gbps);
  m.ceiling_gbps = Median(ceilings);
  m.ratio = Median(ratios);
  report.Add(m);
  return absl::OkStatus();
}

}  // namespace tandem::cli
