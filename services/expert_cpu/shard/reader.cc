#include "services/expert_cpu/shard/reader.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <thread>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "services/expert_cpu/shard/shard.h"

namespace tandem::expert {
namespace {

constexpr uint64_t kRequestBytes = 8 << 20;

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

absl::Status ReadFully(int fd, const std::string& path, uint64_t offset, uint8_t* to, uint64_t bytes) {
  while (bytes > 0) {
    const ssize_t n = pread(fd, to, bytes, static_cast<off_t>(offset));
    if (n < 0) {
      if (errno == EINTR) continue;
      return absl::DataLossError(
          absl::StrCat(path, ": reading at byte ", offset, " fails: ", std::strerror(errno)));
    }
    if (n == 0) return absl::DataLossError(absl::StrCat(path, ": ends at byte ", offset, ", too early"));
    to += n;
    offset += static_cast<uint64_t>(n);
    bytes -= static_cast<uint64_t>(n);
  }
  return absl::OkStatus();
}

bool Contiguous(const ReadPiece& piece) { return piece.row_bytes == piece.row_stride; }

// A piece of at most about kRequestBytes of the file.
struct Request {
  const ReadPiece* piece;
  int64_t first_row;
  int64_t rows;
};

std::vector<Request> Split(const std::vector<ReadPiece>& pieces) {
  std::vector<Request> out;
  for (const ReadPiece& piece : pieces) {
    const int64_t rows_each =
        std::max<int64_t>(1, static_cast<int64_t>(kRequestBytes / std::max<uint64_t>(1, piece.row_stride)));
    for (int64_t row = 0; row < piece.rows; row += rows_each) {
      out.push_back({&piece, row, std::min(rows_each, piece.rows - row)});
    }
  }
  return out;
}

absl::Status Serve(const Request& request, int fd, const std::string& path, std::vector<uint8_t>& buffer) {
  const ReadPiece& piece = *request.piece;
  const auto first = static_cast<uint64_t>(request.first_row);
  const auto rows = static_cast<uint64_t>(request.rows);
  uint8_t* to = piece.to + first * piece.row_bytes;
  const uint64_t from = piece.offset + first * piece.row_stride + piece.row_begin;
  if (Contiguous(piece)) return ReadFully(fd, path, from, to, rows * piece.row_bytes);
  const uint64_t span = (rows - 1) * piece.row_stride + piece.row_bytes;
  if (buffer.size() < span) buffer.resize(span);
  TANDEM_RETURN_IF_ERROR(ReadFully(fd, path, from, buffer.data(), span));
  for (uint64_t r = 0; r < rows; ++r) {
    std::memcpy(to + r * piece.row_bytes, buffer.data() + r * piece.row_stride, piece.row_bytes);
  }
  return absl::OkStatus();
}

}  // namespace

uint64_t WantedBytes(const std::vector<ReadPiece>& pieces) {
  uint64_t total = 0;
  for (const ReadPiece& piece : pieces) total += static_cast<uint64_t>(piece.rows) * piece.row_bytes;
  return total;
}

absl::Status ReadPieces(const std::vector<std::string>& paths, const std::vector<ReadPiece>& pieces,
                        int threads, LoadProgress& progress) {
  std::vector<Descriptor> files;
  for (const std::string& path : paths) {
    files.emplace_back(open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (files.back().get() < 0) {
      return absl::NotFoundError(absl::StrCat(path, " cannot be opened: ", std::strerror(errno)));
    }
  }
  const std::vector<Request> requests = Split(pieces);
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  absl::Status first_error;
  const auto work = [&] {
    std::vector<uint8_t> buffer;
    while (!failed.load(std::memory_order_relaxed)) {
      const size_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= requests.size()) return;
      const Request& request = requests[i];
      const auto file = static_cast<size_t>(request.piece->file);
      const absl::Status status = progress.cancel.load(std::memory_order_relaxed)
                                      ? absl::CancelledError("loading was cancelled")
                                      : Serve(request, files[file].get(), paths[file], buffer);
      if (!status.ok()) {
        const std::lock_guard lock(mutex);
        if (first_error.ok()) first_error = status;
        failed = true;
        return;
      }
      progress.bytes_read += static_cast<uint64_t>(request.rows) * request.piece->row_bytes;
    }
  };
  std::vector<std::thread> workers;
  const auto count = std::min<size_t>(static_cast<size_t>(std::max(1, threads)), requests.size());
  for (size_t t = 1; t < count; ++t) workers.emplace_back(work);
  work();
  for (std::thread& worker : workers) worker.join();
  return first_error;
}

}  // namespace tandem::expert
