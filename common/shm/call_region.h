// The layout of the memory through which two processes call each other: a header, then slots of fixed
// capacity. A call is `n` rows; a row has k (id, weight) pairs, an input vector and an output vector.
//
//   header   written once by the host, 4096 bytes
//   slot i   bell flag | answer flag | request | answer header | message | ids | weights | input | output
//
// The host (who answers) makes the region; the client (who calls) maps it. Neither trusts the other: the
// layout is computed by each side from the shape that was agreed on out of band, never read from the memory;
// every field that steers an access is copied once into private memory and checked there.
#pragma once

#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/shm/flag.h"

namespace tandem::shm {

inline constexpr uint64_t kRegionMagic = 0x31474e524d444e54;  // "TNDMRNG1"
inline constexpr uint32_t kRegionVersion = 3;
inline constexpr uint64_t kHeaderBytes = 4096;
inline constexpr uint32_t kMessageBytes = 512;

// What both sides agree on before there is a region.
struct RegionShape {
  uint32_t slots = 1;      // power of two, at most 64; call number s uses slot s % slots
  uint32_t max_rows = 0;   // of one call
  uint32_t max_pairs = 0;  // (id, weight) pairs of a row
  uint32_t width = 0;      // values of an input row, and of an output row

  bool operator==(const RegionShape&) const = default;
};

// One session over one region. The epoch is random and new for each, so that what was written for another
// session is never taken for this one's.
struct SessionId {
  uint64_t epoch = 0;
  uint64_t first_sequence = 1;  // number of the first call; the numbers go up by one
};

enum class ValueType : uint32_t { kF32 = 1, kBf16 = 2, kF64 = 3 };

// kServed: the host's own. kBulk: the client is content with sums of bfloat16, too.
enum class CallPrecision : uint32_t { kServed = 0, kBulk = 1 };

// In shared memory, at the beginning. For whoever looks at the memory from outside, and a last check that
// both mean the same.
struct RegionHeader {
  uint64_t magic;
  uint32_t version;
  uint32_t header_bytes;
  uint64_t region_bytes;
  uint64_t slot_bytes;
  uint64_t epoch;
  uint64_t first_sequence;
  RegionShape shape;
};

// In shared memory, written by the client before it signals `bell`.
struct alignas(128) RequestHeader {
  uint64_t sequence;
  uint64_t epoch;
  uint32_t layer;
  uint32_t rows;
  uint32_t pairs;        // of a row
  uint32_t input_type;   // ValueType: F32 or BF16
  uint32_t output_type;  // ValueType: F32 or F64
  uint32_t precision;    // CallPrecision
};

// The `status` of a call that nobody answers any more. Every other value is a google.rpc.Code.
inline constexpr uint32_t kStatusAborted = 0xffffffff;

// In shared memory, written by the host before it signals `answer`; or by the client's own watchdog, which
// writes kStatusAborted and signals `answer` so that a device that waits for the number goes on.
struct alignas(128) AnswerHeader {
  uint64_t sequence;
  uint64_t epoch;
  uint32_t status;
  uint32_t message_bytes;
  uint64_t nanoseconds;  // spent on the call
  uint64_t bytes_read;   // of weights
  uint64_t distinct;     // experts
};

struct SlotControl {
  Flag bell;
  Flag answered;
  RequestHeader request;
  AnswerHeader answer;
  char message[kMessageBytes];
};

// What the host says about a call beside its output.
struct CallFigures {
  uint64_t nanoseconds = 0;
  uint64_t bytes_read = 0;
  uint64_t distinct = 0;
};

// Where everything is, in bytes from the region's beginning.
class RegionLayout {
 public:
  // InvalidArgument: a size is zero, or too large for any machine.
  static absl::StatusOr<RegionLayout> Of(const RegionShape& shape);

  const RegionShape& shape() const { return shape_; }
  uint64_t region_bytes() const { return kHeaderBytes + shape_.slots * slot_bytes_; }
  uint64_t slot_bytes() const { return slot_bytes_; }
  RegionHeader Header(const SessionId& session) const;

  // The first `rows` rows of slot `slot`'s arrays; nothing is checked here.
  SlotControl& Control(std::span<uint8_t> region, uint64_t slot) const;
  std::span<uint8_t> Ids(std::span<uint8_t> region, uint64_t slot, uint64_t rows, uint64_t pairs) const;
  std::span<uint8_t> Weights(std::span<uint8_t> region, uint64_t slot, uint64_t rows, uint64_t pairs) const;
  std::span<uint8_t> Input(std::span<uint8_t> region, uint64_t slot, uint64_t rows, ValueType type) const;
  std::span<uint8_t> Output(std::span<uint8_t> region, uint64_t slot, uint64_t rows, ValueType type) const;

 private:
  std::span<uint8_t> Part(std::span<uint8_t> region, uint64_t slot, uint64_t offset, uint64_t bytes) const;

  RegionShape shape_;
  uint64_t weights_ = 0, input_ = 0, output_ = 0;  // from the slot's beginning; the ids follow SlotControl
  uint64_t slot_bytes_ = 0;
};

uint64_t ValueBytes(ValueType type);

// What the bell and the answer flag of call `sequence`'s slot show before that call.
uint32_t FlagBefore(const RegionLayout& layout, const SessionId& session, uint64_t sequence);

// One field of memory that the peer may change at any moment.
template <typename T>
T ReadOnce(T& field) {
  return std::atomic_ref<T>(field).load(std::memory_order_relaxed);
}
template <typename T>
void WriteOnce(T& field, T value) {
  std::atomic_ref<T>(field).store(value, std::memory_order_relaxed);
}

}  // namespace tandem::shm
