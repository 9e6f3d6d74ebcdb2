#include "services/attention_gpu/backend/cuda/sampler.h"

#include <algorithm>
#include <new>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"

namespace tandem::attention::cuda {
namespace {

constexpr int64_t kFirstEdits = int64_t{1} << 16;

bool HasPenalties(const SamplingParams& p) {
  return p.presence_penalty != 0 || p.frequency_penalty != 0 || p.repetition_penalty != 1;
}
bool IsGreedy(const SamplingParams& p) { return p.temperature == 0 || p.top_k == 1; }

}  // namespace

bool IsPlainGreedy(const SamplingParams& p) {
  return IsGreedy(p) && !p.logprobs && p.logit_bias.empty() && !HasPenalties(p);
}

Sampler::Sampler(int64_t vocab) : vocab_(vocab) {}

void Sampler::Want(Arena& device, SamplingState* s) {
  constexpr int64_t kParts = int64_t{kSamplingRows} * kSamplingParts;
  device.Want(&s->fetched, 1);
  device.Want(&s->best, kParts);
  device.Want(&s->raw_max, kParts);
  device.Want(&s->raw_sum, kParts);
  device.Want(&s->raw_top, kParts * kMostTopLogprobs);
  device.Want(&s->bin_count, int64_t{kSamplingRows} * kSamplingBins);
  device.Want(&s->bin_weight, int64_t{kSamplingRows} * kSamplingBins);
  device.Want(&s->finished, kSamplingRows);
  device.Want(&s->tokens, kSamplingRows);
}

uint64_t Sampler::DeviceBytes() {
  Arena arena(Arena::Kind::kDevice);
  SamplingState state;
  Want(arena, &state);
  return arena.bytes() + kFirstEdits * sizeof(RawLogit);
}

absl::StatusOr<std::unique_ptr<Sampler>> Sampler::Create(int64_t vocab) {
  if (vocab < 1 || vocab > kMostSamplingVocab) {
    return absl::InvalidArgumentError(
        absl::StrCat("a vocabulary of ", vocab, ": the sampler takes up to ", kMostSamplingVocab));
  }
  std::unique_ptr<Sampler> s(new Sampler(vocab));
  Want(s->device_, &s->state_);
  SamplingInput* input = nullptr;
  s->host_.Want(&input, 1);
  s->host_.Want(&s->state_.results, kSamplingRows);
  TANDEM_RETURN_IF_ERROR(s->device_.Allocate("the sampler"));
  TANDEM_RETURN_IF_ERROR(s->host_.Allocate("the sampler"));
  s->input_ = new (input) SamplingInput();
  s->state_.input = input;
  TANDEM_RETURN_IF_ERROR(
      ToStatus(cudaMemset(s->state_.finished, 0, kSamplingRows * sizeof(uint32_t)), "the sampler"));
  TANDEM_RETURN_IF_ERROR(ToStatus(cudaDeviceSynchronize(), "the sampler"));
  TANDEM_RETURN_IF_ERROR(s->ReserveEdits(kFirstEdits));
  return s;
}

Sampler::~Sampler() {
  if (edits_ != nullptr) cudaFreeHost(edits_);
  if (raw_ != nullptr) cudaFree(raw_);
}

absl::Status Sampler::ReserveEdits(int64_t count) {
  if (count <= most_edits_) return absl::OkStatus();
  if (edits_ != nullptr) cudaFreeHost(edits_);
  if (raw_ != nullptr) cudaFree(raw_);
  edits_ = nullptr;
  raw_ = nullptr;
  input_->edits = nullptr;
  input_->raw = nullptr;
  const int64_t room = std::max(count, 2 * most_edits_);
  most_edits_ = 0;
  TANDEM_RETURN_IF_ERROR(ToStatus(
      cudaMallocHost(reinterpret_cast<void**>(&edits_), room * sizeof(SamplingEdit)), "changes of logits"));
  TANDEM_RETURN_IF_ERROR(
      ToStatus(cudaMalloc(reinterpret_cast<void**>(&raw_), room * sizeof(RawLogit)), "changes of logits"));
  most_edits_ = room;
  input_->edits = edits_;
  input_->raw = raw_;
  return absl::OkStatus();
}

absl::Status Sampler::Stage(std::span<const Request> requests) {
  if (static_cast<int64_t>(requests.size()) > kMaxRows) {
    return absl::InvalidArgumentError(
        absl::StrCat(requests.size(), " rows to sample, the limit is ", kMaxRows));
  }
  int64_t edits = 0;
  for (const Request& r : requests) {
    if (r.params == nullptr) continue;
    edits += static_cast<int64_t>(r.params->logit_bias.size());
    if (r.counts != nullptr && HasPenalties(*r.params)) edits += static_cast<int64_t>(r.counts->size());
  }
  TANDEM_RETURN_IF_ERROR(ReserveEdits(edits));

  greedy_ = true;
  int64_t at = 0;
  for (int64_t i = 0; i < kMaxRows; ++i) {
    SamplingRow row;
    if (i < static_cast<int64_t>(requests.size()) && requests[i].params != nullptr) {
      const SamplingParams& p = *requests[i].params;
      greedy_ = greedy_ && IsPlainGreedy(p);
      row.flags = 0;
      if (IsGreedy(p)) row.flags |= kSamplingGreedy;
      if (p.logprobs) row.flags |= kSamplingLogprobs;
      row.inverse_temperature = IsGreedy(p) ? 1.0 : 1.0 / p.temperature;
      row.top_p = p.top_p;
      row.min_p = p.min_p;
      row.uniform = UniformAt(p.seed, requests[i].position);
      row.top_k = static_cast<int32_t>(std::min<int64_t>(p.top_k, vocab_));
      row.top_logprobs = static_cast<int32_t>(std::min<int64_t>(p.top_logprobs, kMostTopLogprobs));
      row.presence = p.presence_penalty;
      row.frequency = p.frequency_penalty;
      row.repetition = p.repetition_penalty;
      row.first_edit = at;
      for (const auto& [token, bias] : p.logit_bias) {
        if (token < 0 || token >= vocab_) {
          return absl::InvalidArgumentError(
              absl::StrCat("logit_bias of token ", token, ": the vocabulary has ", vocab_));
        }
        edits_[at].token = token;
        edits_[at++].bias = bias;
      }
      row.biases = static_cast<int32_t>(at - row.first_edit);
      // Biases of one token are added in the order given, by one thread: they must be neighbours.
      std::stable_sort(edits_ + row.first_edit, edits_ + at,
                       [](const SamplingEdit& a, const SamplingEdit& b) { return a.token < b.token; });
      if (requests[i].counts != nullptr && HasPenalties(p)) {
        for (const auto& [token, count] : *requests[i].counts) {
          if (count <= 0 || token < 0 || token >= vocab_) continue;
          edits_[at].token = token;
          edits_[at++].count = count;
        }
      }
      row.penalties = static_cast<int32_t>(at - row.first_edit) - row.biases;
    }
    input_->rows[i] = row;
  }
  return absl::OkStatus();
}

absl::Status Sampler::Launch(float* logits, int64_t rows, cudaStream_t stream) {
  return ToStatus(LaunchSampling(state_, logits, rows, vocab_, stream), "the sampler");
}

absl::Status Sampler::LaunchGreedy(const float* logits, int64_t rows, cudaStream_t stream) {
  return ToStatus(LaunchGreedySampling(state_, logits, rows, vocab_, stream), "the likeliest token");
}

SampledToken Sampler::Read(int64_t row) const {
  const SamplingResult& result = state_.results[row];
  const SamplingRow& asked = input_->rows[row];
  SampledToken out;
  out.token = result.token;
  if ((asked.flags & kSamplingLogprobs) == 0) return out;
  out.logprob = result.logprob;
  const int64_t n = std::min<int64_t>(asked.top_logprobs, vocab_);
  for (int64_t i = 0; i < n; ++i) out.top.push_back({result.top_tokens[i], result.top_logprobs[i]});
  return out;
}

}  // namespace tandem::attention::cuda
