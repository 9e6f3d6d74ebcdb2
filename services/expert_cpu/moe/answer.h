// Where a call's answer goes.
#pragma once

#include <cstdint>
#include <cstring>

#include "services/expert_cpu/moe/moe.h"

namespace tandem::expert {

struct AnswerTo {
  uint8_t* bytes;  // of any alignment
  AnswerType type;

  // Values [at, at + n) of the answer.
  void Write(const double* sums, int64_t at, int64_t n) const {
    if (type == AnswerType::kF64) {
      std::memcpy(bytes + 8 * at, sums, static_cast<size_t>(8 * n));
      return;
    }
    for (int64_t i = 0; i < n; ++i) {
      const auto rounded = static_cast<float>(sums[i]);
      std::memcpy(bytes + 4 * (at + i), &rounded, sizeof rounded);
    }
  }
};

}  // namespace tandem::expert
