#include "common/shm/call_host.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "absl/strings/str_cat.h"

namespace tandem::shm {

CallHost::CallHost(std::span<uint8_t> region, const RegionLayout& layout, const SessionId& session,
                   WaitPolicy policy)
    : region_(region), layout_(layout), session_(session), waiter_(policy), next_(session.first_sequence) {
  const auto before = static_cast<uint32_t>(session.first_sequence - 1);
  for (uint64_t slot = 0; slot < layout.shape().slots; ++slot) {
    auto* control = new (&layout.Control(region, slot)) SlotControl{};
    control->bell.sequence.store(before, std::memory_order_relaxed);
    control->answered.sequence.store(before, std::memory_order_relaxed);
  }
  const RegionHeader header = layout.Header(session);
  std::memcpy(region.data(), &header, sizeof header);
}

absl::Status CallHost::Next(absl::Duration most, IncomingCall* call) {
  const uint64_t slots = layout_.shape().slots;
  const uint64_t slot = next_ % slots;
  SlotControl& control = layout_.Control(region_, slot);
  waits_for_.store(slot, std::memory_order_relaxed);
  switch (waiter_.Wait(control.bell, FlagBefore(layout_, session_, next_), most, stop_)) {
    case WaitResult::kTimeout:
      return absl::DeadlineExceededError("no call");
    case WaitResult::kStopped:
      return absl::CancelledError("stopped");
    case WaitResult::kSignalled:
      break;
  }
  if (stop_.load(std::memory_order_acquire)) return absl::CancelledError("stopped");
  const uint32_t bell = control.bell.sequence.load(std::memory_order_acquire);
  const uint64_t sequence = ReadOnce(control.request.sequence), epoch = ReadOnce(control.request.epoch);
  if (bell != static_cast<uint32_t>(next_) || sequence != next_ || epoch != session_.epoch) {
    return absl::DataLossError(absl::StrCat("the client rang ", bell, " for call ", sequence, " of session ",
                                            epoch, "; call ", next_, " of session ", session_.epoch,
                                            " was due"));
  }
  ReadCall(control, slot, call);
  ++next_;
  return absl::OkStatus();
}

void CallHost::ReadCall(SlotControl& control, uint64_t slot, IncomingCall* call) {
  *call = IncomingCall();
  call->sequence = next_;
  call->layer = ReadOnce(control.request.layer);
  const uint32_t rows = ReadOnce(control.request.rows), pairs = ReadOnce(control.request.pairs);
  const auto input = static_cast<ValueType>(ReadOnce(control.request.input_type));
  const auto output = static_cast<ValueType>(ReadOnce(control.request.output_type));
  const auto precision = static_cast<CallPrecision>(ReadOnce(control.request.precision));
  const RegionShape& shape = layout_.shape();
  if (rows > shape.max_rows || pairs < 1 || pairs > shape.max_pairs) {
    call->valid = absl::InvalidArgumentError(absl::StrCat("a call of ", rows, " tokens with ", pairs,
                                                          " experts each; the session is for ",
                                                          shape.max_rows, " with ", shape.max_pairs));
    return;
  }
  if (input != ValueType::kF32 && input != ValueType::kBf16) {
    call->valid = absl::InvalidArgumentError(
        absl::StrCat("activation type ", static_cast<uint32_t>(input), " is not F32 or BF16"));
    return;
  }
  if (output != ValueType::kF32 && output != ValueType::kF64) {
    call->valid = absl::InvalidArgumentError(
        absl::StrCat("answer type ", static_cast<uint32_t>(output), " is not F32 or F64"));
    return;
  }
  if (precision != CallPrecision::kServed && precision != CallPrecision::kBulk) {
    call->valid = absl::InvalidArgumentError(
        absl::StrCat("precision ", static_cast<uint32_t>(precision), " is none of a call"));
    return;
  }
  call->rows = rows;
  call->pairs = pairs;
  call->input_type = input;
  call->output_type = output;
  call->precision = precision;
  call->ids = layout_.Ids(region_, slot, rows, pairs);
  call->weights = layout_.Weights(region_, slot, rows, pairs);
  call->input = layout_.Input(region_, slot, rows, input);
  call->output = layout_.Output(region_, slot, rows, output);
}

void CallHost::Answer(const IncomingCall& call, const absl::Status& status, const CallFigures& figures) {
  SlotControl& control = layout_.Control(region_, call.sequence % layout_.shape().slots);
  AnswerHeader& answer = control.answer;
  uint32_t message_bytes = 0;
  if (!status.ok()) {
    message_bytes = static_cast<uint32_t>(std::min<size_t>(status.message().size(), kMessageBytes));
    std::memcpy(control.message, status.message().data(), message_bytes);
  }
  WriteOnce(answer.sequence, call.sequence);
  WriteOnce(answer.epoch, session_.epoch);
  WriteOnce(answer.message_bytes, message_bytes);
  WriteOnce(answer.nanoseconds, figures.nanoseconds);
  WriteOnce(answer.bytes_read, figures.bytes_read);
  WriteOnce(answer.distinct, figures.distinct);
  WriteOnce(answer.status, static_cast<uint32_t>(status.code()));
  Signal(control.answered, static_cast<uint32_t>(call.sequence));
}

void CallHost::Stop() {
  stop_.store(true, std::memory_order_seq_cst);
  Wake(layout_.Control(region_, waits_for_.load(std::memory_order_relaxed)).bell);
}

}  // namespace tandem::shm
