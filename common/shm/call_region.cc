#include "common/shm/call_region.h"

#include <bit>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"

namespace tandem::shm {
namespace {

// Beyond these no product of them overflows 64 bits.
constexpr uint32_t kMostSlots = 64;
constexpr uint32_t kMostRows = 1 << 20;
constexpr uint32_t kMostPairs = 1 << 12;
constexpr uint32_t kMostWidth = 1 << 20;

constexpr uint64_t RoundUp(uint64_t bytes, uint64_t to) { return (bytes + to - 1) / to * to; }

absl::Status InRange(const char* what, uint32_t value, uint32_t most) {
  if (value >= 1 && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("a call region with ", value, " ", what, "; from 1 to ", most, " can be"));
}

}  // namespace

uint64_t ValueBytes(ValueType type) {
  switch (type) {
    case ValueType::kF32:
      return 4;
    case ValueType::kBf16:
      return 2;
    case ValueType::kF64:
      return 8;
  }
  return 0;
}

uint32_t FlagBefore(const RegionLayout& layout, const SessionId& session, uint64_t sequence) {
  const uint64_t slots = layout.shape().slots;
  const bool first = sequence - session.first_sequence < slots;
  return static_cast<uint32_t>(first ? session.first_sequence - 1 : sequence - slots);
}

absl::StatusOr<RegionLayout> RegionLayout::Of(const RegionShape& shape) {
  TANDEM_RETURN_IF_ERROR(InRange("slots", shape.slots, kMostSlots));
  TANDEM_RETURN_IF_ERROR(InRange("rows", shape.max_rows, kMostRows));
  TANDEM_RETURN_IF_ERROR(InRange("pairs a row", shape.max_pairs, kMostPairs));
  TANDEM_RETURN_IF_ERROR(InRange("values a row", shape.width, kMostWidth));
  if (!std::has_single_bit(shape.slots)) {
    return absl::InvalidArgumentError(absl::StrCat(shape.slots, " slots are not a power of two"));
  }
  constexpr uint64_t kPart = 256, kPage = 4096;
  RegionLayout out;
  out.shape_ = shape;
  const uint64_t rows = shape.max_rows, pairs = rows * shape.max_pairs, values = rows * shape.width;
  out.weights_ = RoundUp(sizeof(SlotControl) + pairs * sizeof(int32_t), kPart);
  out.input_ = RoundUp(out.weights_ + pairs * sizeof(float), kPart);
  out.output_ = RoundUp(out.input_ + values * sizeof(float), kPart);
  out.slot_bytes_ = RoundUp(out.output_ + values * sizeof(double), kPage);
  return out;
}

RegionHeader RegionLayout::Header(const SessionId& session) const {
  return {kRegionMagic,           kRegionVersion, static_cast<uint32_t>(kHeaderBytes),
          region_bytes(),         slot_bytes_,    session.epoch,
          session.first_sequence, shape_};
}

SlotControl& RegionLayout::Control(std::span<uint8_t> region, uint64_t slot) const {
  return *reinterpret_cast<SlotControl*>(region.data() + kHeaderBytes + slot * slot_bytes_);
}

std::span<uint8_t> RegionLayout::Part(std::span<uint8_t> region, uint64_t slot, uint64_t offset,
                                      uint64_t bytes) const {
  return region.subspan(kHeaderBytes + slot * slot_bytes_ + offset, bytes);
}

std::span<uint8_t> RegionLayout::Ids(std::span<uint8_t> region, uint64_t slot, uint64_t rows,
                                     uint64_t pairs) const {
  return Part(region, slot, sizeof(SlotControl), rows * pairs * sizeof(int32_t));
}

std::span<uint8_t> RegionLayout::Weights(std::span<uint8_t> region, uint64_t slot, uint64_t rows,
                                         uint64_t pairs) const {
  return Part(region, slot, weights_, rows * pairs * sizeof(float));
}

std::span<uint8_t> RegionLayout::Input(std::span<uint8_t> region, uint64_t slot, uint64_t rows,
                                       ValueType type) const {
  return Part(region, slot, input_, rows * shape_.width * ValueBytes(type));
}

std::span<uint8_t> RegionLayout::Output(std::span<uint8_t> region, uint64_t slot, uint64_t rows,
                                        ValueType type) const {
  return Part(region, slot, output_, rows * shape_.width * ValueBytes(type));
}

}  // namespace tandem::shm
