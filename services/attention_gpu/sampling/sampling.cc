#include "services/attention_gpu/sampling/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "absl/strings/str_cat.h"

namespace tandem::attention {
namespace {

struct Candidate {
  float logit;
  int32_t token;
};

bool Better(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

// The best `k` in falling order.
std::vector<Candidate> Best(std::span<const float> logits, size_t k) {
  std::vector<Candidate> heap;  // the worst of the kept ones on top
  k = std::min(k, logits.size());
  if (k == 0) return heap;
  heap.reserve(k);
  for (size_t i = 0; i < logits.size(); ++i) {
    const Candidate c{logits[i], static_cast<int32_t>(i)};
    if (heap.size() < k) {
      heap.push_back(c);
      std::push_heap(heap.begin(), heap.end(), Better);
    } else if (Better(c, heap.front())) {
      std::pop_heap(heap.begin(), heap.end(), Better);
      heap.back() = c;
      std::push_heap(heap.begin(), heap.end(), Better);
    }
  }
  std::sort_heap(heap.begin(), heap.end(), Better);
  return heap;
}

double LogSumExp(std::span<const float> logits) {
  float top = -std::numeric_limits<float>::infinity();
  for (float l : logits) top = std::max(top, l);
  if (std::isinf(top)) return top;
  double sum = 0;
  for (float l : logits) sum += std::exp(static_cast<double>(l) - top);
  return top + std::log(sum);
}

void ApplyPenalties(std::span<float> logits, const SamplingParams& p,
                    const std::unordered_map<int32_t, int32_t>& counts) {
  for (const auto& [token, bias] : p.logit_bias) logits[token] += bias;
  if (p.presence_penalty == 0 && p.frequency_penalty == 0 && p.repetition_penalty == 1) return;
  for (const auto& [token, count] : counts) {
    if (count <= 0 || token < 0 || static_cast<size_t>(token) >= logits.size()) continue;
    float& l = logits[token];
    if (p.repetition_penalty != 1) l = l > 0 ? l / p.repetition_penalty : l * p.repetition_penalty;
    l -= p.presence_penalty + p.frequency_penalty * static_cast<float>(count);
  }
}

// How many of the candidates (falling) stay after top_p and min_p. `weights`: exp((logit - best) /
// temperature).
size_t Keep(const std::vector<double>& weights, double total, const SamplingParams& p) {
  size_t keep = weights.size();
  if (p.min_p > 0) {
    size_t n = 0;
    while (n < keep && weights[n] >= p.min_p * weights[0]) ++n;
    keep = std::max<size_t>(n, 1);
  }
  if (p.top_p > 0 && p.top_p < 1) {
    double sum = 0;
    for (size_t i = 0; i < keep; ++i) {
      sum += weights[i];
      if (sum >= p.top_p * total) return i + 1;
    }
  }
  return keep;
}

int32_t Draw(std::span<const float> logits, const SamplingParams& p, uint64_t position) {
  const double inverse_t = 1.0 / p.temperature;
  const size_t limit = p.top_k > 0 ? std::min<size_t>(p.top_k, logits.size()) : logits.size();
  float best = -std::numeric_limits<float>::infinity();
  for (float l : logits) best = std::max(best, l);
  // No weights can be formed: nothing is possible, or something is infinitely likely.
  if (std::isinf(best))
    return static_cast<int32_t>(std::find(logits.begin(), logits.end(), best) - logits.begin());

  // The total weight is that of the tokens top_k leaves. Candidates are sorted only as far as they are
  // needed: nearly always a few hundred hold all the probability that top_p asks for.
  const bool cut = p.top_p < 1 || p.min_p > 0;
  size_t wanted = cut ? std::min<size_t>(limit, 256) : limit;
  double total_all = 0;
  if (p.top_k == 0) {
    for (float l : logits) total_all += std::exp((static_cast<double>(l) - best) * inverse_t);
  }
  for (;;) {
    std::vector<Candidate> c = Best(logits, wanted);
    std::vector<double> w(c.size());
    double sum = 0;
    for (size_t i = 0; i < c.size(); ++i) {
      w[i] = std::exp((static_cast<double>(c[i].logit) - best) * inverse_t);
      sum += w[i];
    }
    // top_k, then top_p over what is left, in which case the total is theirs.
    const double total = p.top_k > 0 && wanted == limit ? sum : total_all;
    const bool below_min_p = p.min_p > 0 && w.back() < p.min_p * w[0];
    // What top_p is a share of is known only when all that top_k leaves are here.
    const bool enough = wanted == limit || (p.top_k == 0 ? sum >= p.top_p * total_all || below_min_p
                                                         : p.top_p >= 1 && below_min_p);
    if (!enough) {
      wanted = std::min(limit, wanted * 8);
      continue;
    }
    const size_t keep = Keep(w, total, p);
    double kept = 0;
    for (size_t i = 0; i < keep; ++i) kept += w[i];
    double target = UniformAt(p.seed, position) * kept;
    for (size_t i = 0; i < keep; ++i) {
      target -= w[i];
      if (target < 0) return c[i].token;
    }
    return c[keep - 1].token;
  }
}

}  // namespace

absl::Status Validate(const SamplingParams& p, int64_t vocab_size) {
  auto bad = [](std::string_view name, auto value, std::string_view range) {
    return absl::InvalidArgumentError(
        absl::StrCat(std::string(name), " = ", value, " is not in ", std::string(range)));
  };
  if (!(p.temperature >= 0 && p.temperature <= 100)) return bad("temperature", p.temperature, "[0, 100]");
  if (!(p.top_p > 0 && p.top_p <= 1)) return bad("top_p", p.top_p, "(0, 1]");
  if (!(p.min_p >= 0 && p.min_p < 1)) return bad("min_p", p.min_p, "[0, 1)");
  if (!(p.presence_penalty >= -2 && p.presence_penalty <= 2)) {
    return bad("presence_penalty", p.presence_penalty, "[-2, 2]");
  }
  if (!(p.frequency_penalty >= -2 && p.frequency_penalty <= 2)) {
    return bad("frequency_penalty", p.frequency_penalty, "[-2, 2]");
  }
  if (!(p.repetition_penalty > 0 && p.repetition_penalty <= 100)) {
    return bad("repetition_penalty", p.repetition_penalty, "(0, 100]");
  }
  if (p.top_logprobs > 20) return bad("top_logprobs", p.top_logprobs, "[0, 20]");
  for (const auto& [token, bias] : p.logit_bias) {
    if (token < 0 || token >= vocab_size) {
      return bad("logit_bias token", token, absl::StrCat("[0, ", vocab_size, ")"));
    }
    if (!(bias >= -100 && bias <= 100)) return bad("logit_bias", bias, "[-100, 100]");
  }
  return absl::OkStatus();
}

double UniformAt(uint64_t seed, uint64_t position) {
  uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
  uint32_t k[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(a)};
    std::copy(next, next + 4, c);
    k[0] += 0x9E3779B9;
    k[1] += 0xBB67AE85;
  }
  const uint64_t bits = (static_cast<uint64_t>(c[0]) << 32 | c[1]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

SampledToken Sample(std::span<float> logits, const SamplingParams& p, uint64_t position,
                    const std::unordered_map<int32_t, int32_t>& counts) {
  for (float& l : logits) {
    if (std::isnan(l)) l = -std::numeric_limits<float>::infinity();
  }
  SampledToken out;
  double log_sum = 0;
  if (p.logprobs) {
    log_sum = LogSumExp(logits);
    for (const Candidate& c : Best(logits, p.top_logprobs)) {
      out.top.push_back({c.token, static_cast<float>(c.logit - log_sum)});
    }
  }
  std::vector<float> raw;
  if (p.logprobs) raw.assign(logits.begin(), logits.end());
  ApplyPenalties(logits, p, counts);
  if (p.temperature == 0 || p.top_k == 1) {
    size_t best = 0;
    for (size_t i = 1; i < logits.size(); ++i) {
      if (logits[i] > logits[best]) best = i;
    }
    out.token = static_cast<int32_t>(best);
  } else {
    out.token = Draw(logits, p, position);
  }
  if (p.logprobs) out.logprob = static_cast<float>(raw[out.token] - log_sum);
  return out;
}

}  // namespace tandem::attention
