#include "common/kernels/bulk.h"

#include <array>

#include "common/base/check.h"
#include "common/kernels/dispatch.h"
#include "common/kernels/internal.h"
#include "common/quant/quant.h"

namespace tandem::kernels {
namespace {

using gguf::TensorType;
using internal::kUnit;

const internal::BulkTables* tables_for_testing = nullptr;

const internal::BulkTables& Tables() {
  return tables_for_testing != nullptr ? *tables_for_testing : *internal::BulkAmxTables();
}

// Which column of its unit stands at `position` in [0, kUnit) of the tokens that meet weights of `type`: what
// the decoding in bulk.inc gives.
constexpr int BulkColumn(uint32_t type, int position) {
  const int tile = position / 32, j = position % 32;
  if (type == internal::kTypeQ4_K) {  // 16 even or odd columns of a sub-block, 16 of the one after the next
    return tile / 4 * 128 + (tile % 2 + j / 16 * 2) * 32 + j % 16 * 2 + tile % 4 / 2;
  }
  return tile / 2 * 64 + j % 16 * 4 + tile % 2 * 2 + j / 16;  // every fourth of 64 columns, twice
}

using Order = std::array<uint8_t, kUnit>;
constexpr Order OrderOf(uint32_t type) {
  Order order = {};
  for (int i = 0; i < kUnit; ++i) order[static_cast<size_t>(i)] = static_cast<uint8_t>(BulkColumn(type, i));
  return order;
}
constexpr Order kPairedOrder = OrderOf(internal::kTypeQ4_K), kByteOrder = OrderOf(internal::kTypeQ6_K);
const Order& ColumnsFor(TensorType type) { return type == TensorType::kQ4_K ? kPairedOrder : kByteOrder; }

// value(column) is the column's as bf16.
template <typename Fn>
void InOrder(TensorType type, int64_t cols, uint16_t* to, const Fn& value) {
  const Order& order = ColumnsFor(type);
  for (int64_t c = 0; c < cols; c += kUnit) {
    for (int64_t i = 0; i < kUnit; ++i) to[c + i] = value(c + order[static_cast<size_t>(i)]);
  }
}

}  // namespace

bool BulkAvailable() {
  if (tables_for_testing != nullptr) return true;
  return ActiveIsa() == Isa::kAmx && internal::HasBf16Tiles();
}

bool BulkFits(TensorType type, int64_t rows, int64_t cols) {
  switch (type) {
    case TensorType::kQ4_K:
    case TensorType::kQ5_K:
    case TensorType::kQ6_K:
    case TensorType::kQ8_0:
      return rows % kBulkRowStep == 0 && cols % kBulkColStep == 0;
    default:
      return false;
  }
}

bool BulkSameOrder(TensorType a, TensorType b) { return &ColumnsFor(a) == &ColumnsFor(b); }

void BulkOrderBf16(TensorType type, const uint8_t* x, int64_t cols, uint16_t* to) {
  InOrder(type, cols, to, [&](int64_t c) {
    uint16_t value;
    __builtin_memcpy(&value, x + 2 * c, sizeof value);
    return value;
  });
}

void BulkOrderFloat(TensorType type, const uint8_t* x, int64_t cols, uint16_t* to) {
  InOrder(type, cols, to, [&](int64_t c) {
    float value;
    __builtin_memcpy(&value, x + 4 * c, sizeof value);
    return quant::FloatToBf16(value);
  });
}

void BulkPack(const uint16_t* rows, int64_t cols, std::span<const int32_t> ids, uint16_t* to) {
  Tables().pack(rows, cols, ids.data(), static_cast<int64_t>(ids.size()), to);
}

void BulkMatMul(const Matrix& w, int64_t row_begin, int64_t row_end, const uint16_t* x, int64_t tiles,
                float* sums, const Upcoming& next) {
  TANDEM_CHECK(row_begin >= 0 && row_begin < row_end && row_end <= w.rows);
  TANDEM_CHECK(BulkFits(w.type, row_end - row_begin, w.cols));
  internal::BulkArgs a = {};
  a.type = static_cast<uint32_t>(w.type);
  a.w = w.data + row_begin * w.row_bytes;
  a.row_bytes = w.row_bytes;
  a.rows = row_end - row_begin;
  a.cols = w.cols;
  a.x = x;
  a.tiles = tiles;
  a.sums = sums;
  a.scratch = internal::ThreadScratch();
  if (next.w != nullptr && next.row < next.row_end) {
    a.next = next.w->data + next.row * next.w->row_bytes;
    a.next_row_bytes = next.w->row_bytes;
    a.next_rows = next.row_end - next.row;
  }
  Tables().matmul(a);
}

void BulkSiluMul(TensorType type, float* gate, const float* up, int64_t tiles, int64_t row_begin,
                 int64_t row_end, int64_t cols, uint16_t* to) {
  const int64_t rows = row_end - row_begin;
  SiluMul(gate, up, gate, BulkSums(tiles, rows));
  Tables().pack_rows(ColumnsFor(type).data(), gate, tiles, row_begin, rows, cols, to);
}

void BulkAdd(const float* sums, int64_t tiles, int64_t n, int64_t row_begin, int64_t row_end,
             const LeafSum& to) {
  Tables().add(sums, tiles, row_end - row_begin, n, to.weights, to.ids, to.sum + row_begin, to.ld, to.grid);
}

namespace internal {

void SetBulkTablesForTesting(const BulkTables* tables) { tables_for_testing = tables; }

}  // namespace internal

}  // namespace tandem::kernels
