#include "common/shm/call_client.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/status_macros.h"

namespace tandem::shm {
namespace {
constexpr auto kLastCode = static_cast<uint32_t>(absl::StatusCode::kUnauthenticated);
}  // namespace

absl::Status CallClient::CheckHeader(std::span<uint8_t> region, const RegionLayout& layout,
                                     const SessionId& session) {
  const RegionHeader want = layout.Header(session);
  RegionHeader have;
  std::memcpy(&have, region.data(), sizeof have);
  if (have.magic != want.magic || have.version != want.version) {
    return absl::FailedPreconditionError(absl::StrCat("the region is of version ", have.version,
                                                      " with magic ", absl::Hex(have.magic), ", not ",
                                                      want.version, " with ", absl::Hex(want.magic)));
  }
  if (have.header_bytes != want.header_bytes || have.region_bytes != want.region_bytes ||
      have.slot_bytes != want.slot_bytes || have.epoch != want.epoch ||
      have.first_sequence != want.first_sequence || have.shape != want.shape) {
    return absl::FailedPreconditionError("the region is not the one that was announced");
  }
  return absl::OkStatus();
}

CallClient::CallClient(std::span<uint8_t> region, const RegionLayout& layout, const SessionId& session,
                       WaitPolicy policy)
    : region_(region),
      layout_(layout),
      session_(session),
      waiter_(policy),
      sequence_(session.first_sequence - 1) {}

absl::StatusOr<OutgoingCall> CallClient::Prepare(uint32_t layer, uint32_t rows, uint32_t pairs,
                                                 ValueType input, ValueType output, CallPrecision precision) {
  {
    const std::lock_guard lock(mutex_);
    if (!aborted_.ok()) return aborted_;
  }
  const RegionShape& shape = layout_.shape();
  if (rows > shape.max_rows || pairs < 1 || pairs > shape.max_pairs) {
    return absl::InvalidArgumentError(absl::StrCat("a call of ", rows, " rows with ", pairs,
                                                   " pairs; the region has room for ", shape.max_rows,
                                                   " with ", shape.max_pairs));
  }
  rows_ = rows;
  output_ = output;
  const uint64_t sequence = sequence_ + 1, slot = sequence % shape.slots;
  RequestHeader& request = Control(sequence).request;
  WriteOnce(request.sequence, sequence);
  WriteOnce(request.epoch, session_.epoch);
  WriteOnce(request.layer, layer);
  WriteOnce(request.rows, rows);
  WriteOnce(request.pairs, pairs);
  WriteOnce(request.input_type, static_cast<uint32_t>(input));
  WriteOnce(request.output_type, static_cast<uint32_t>(output));
  WriteOnce(request.precision, static_cast<uint32_t>(precision));
  return OutgoingCall{layout_.Ids(region_, slot, rows, pairs), layout_.Weights(region_, slot, rows, pairs),
                      layout_.Input(region_, slot, rows, input)};
}

absl::Status CallClient::Ring() {
  {
    const std::lock_guard lock(mutex_);
    if (!aborted_.ok()) return aborted_;
    ++sequence_;
    in_flight_ = true;
    call_aborted_ = false;
  }
  Signal(Control(sequence_).bell, static_cast<uint32_t>(sequence_));
  return absl::OkStatus();
}

absl::StatusOr<CallAnswer> CallClient::Await(absl::Time deadline) {
  SlotControl& control = Control(sequence_);
  const uint32_t before = FlagBefore(layout_, session_, sequence_);
  // In slices: a host that overwrites the number which Abort has written cannot hold this thread.
  for (;;) {
    const absl::Duration left = deadline - absl::Now();
    if (left <= absl::ZeroDuration()) Abort(absl::DeadlineExceededError("no answer in time"));
    const absl::Duration most = std::clamp(left, absl::ZeroDuration(), absl::Milliseconds(100));
    if (waiter_.Wait(control.answered, before, most, never_) == WaitResult::kSignalled) break;
    const std::lock_guard lock(mutex_);
    if (call_aborted_) break;
  }
  {
    const std::lock_guard lock(mutex_);
    in_flight_ = false;
    if (call_aborted_) return aborted_;
  }
  return ReadAnswer(control);
}

absl::StatusOr<uint64_t> CallClient::BeginRun(uint64_t calls) {
  const std::lock_guard lock(mutex_);
  if (!aborted_.ok()) return aborted_;
  const uint64_t first = sequence_ + 1;
  sequence_ += calls;
  run_ = true;
  SetAwake(true);
  return first;
}

absl::Status CallClient::EndRun(bool made_all, const absl::Status& why) {
  if (!made_all) Abort(why);
  const std::lock_guard lock(mutex_);
  run_ = false;
  SetAwake(false);
  return aborted_;
}

uint32_t CallClient::Answers() const {
  uint32_t sum = 0;
  for (uint64_t i = 0; i < layout_.shape().slots; ++i) {
    sum += Control(i).answered.sequence.load(std::memory_order_relaxed);
  }
  return sum;
}

void CallClient::SetAwake(bool awake) {
  for (uint64_t i = 0; i < layout_.shape().slots; ++i) shm::SetAwake(Control(i).bell, awake);
}

absl::Status CallClient::AnswerStatus(uint64_t sequence) {
  SlotControl& control = Control(sequence);
  const uint32_t status = ReadOnce(control.answer.status);
  if (ReadOnce(control.answer.sequence) != sequence || ReadOnce(control.answer.epoch) != session_.epoch) {
    return absl::DataLossError(absl::StrCat("its answer to call ", sequence, " is gone"));
  }
  if (status == 0) return absl::OkStatus();
  if (status > kLastCode) return absl::DataLossError(absl::StrCat("it answered with status ", status));
  const uint32_t message_bytes = std::min(ReadOnce(control.answer.message_bytes), kMessageBytes);
  return absl::Status(static_cast<absl::StatusCode>(status),
                      absl::string_view(control.message, message_bytes));
}

absl::StatusOr<CallAnswer> CallClient::ReadAnswer(SlotControl& control) {
  const uint32_t flag = control.answered.sequence.load(std::memory_order_acquire);
  AnswerHeader& header = control.answer;
  const uint64_t sequence = ReadOnce(header.sequence), epoch = ReadOnce(header.epoch);
  const uint32_t status = ReadOnce(header.status);
  if (flag != static_cast<uint32_t>(sequence_) || sequence != sequence_ || epoch != session_.epoch ||
      status > kLastCode) {
    const absl::Status broken = absl::DataLossError(
        absl::StrCat("it answered ", flag, " for call ", sequence, " of session ", epoch, " with status ",
                     status, "; call ", sequence_, " of session ", session_.epoch, " was due"));
    Abort(broken);
    return broken;
  }
  CallAnswer out;
  out.figures = {ReadOnce(header.nanoseconds), ReadOnce(header.bytes_read), ReadOnce(header.distinct)};
  out.status = AnswerStatus(sequence_);
  if (out.status.ok())
    out.output = layout_.Output(region_, sequence_ % layout_.shape().slots, rows_, output_);
  return out;
}

void CallClient::Abort(const absl::Status& reason) {
  const std::lock_guard lock(mutex_);
  if (aborted_.ok()) aborted_ = reason;
  if (run_) {
    // Again with each Abort: the host may still answer, which sets the number back.
    for (uint64_t i = 0; i < layout_.shape().slots; ++i) {
      SlotControl& control = Control(i);
      WriteOnce(control.answer.status, kStatusAborted);
      Signal(control.answered, static_cast<uint32_t>(sequence_));
    }
    return;
  }
  if (!in_flight_ || call_aborted_) return;
  SlotControl& control = Control(sequence_);
  const auto number = static_cast<uint32_t>(sequence_);
  if (control.answered.sequence.load(std::memory_order_acquire) == number) return;  // the answer is there
  call_aborted_ = true;
  WriteOnce(control.answer.status, kStatusAborted);
  Signal(control.answered, number);
  Wake(control.answered);
}

}  // namespace tandem::shm
