#include "services/attention_gpu/backend/cuda/streamed_experts.h"

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/base/status_macros.h"
#include "services/attention_gpu/backend/cuda/kernels.h"

namespace tandem::attention::cuda {
namespace {

constexpr int64_t kMostMiddlePairs = 4096;
constexpr uint64_t kGroupBytes = uint64_t{128} << 20;  // enough that a copy's beginning does not matter

const WeightStack& StackOf(const LayerWeights& layer, int matrix) {
  return matrix == 0 ? layer.gate : matrix == 1 ? layer.up : layer.down;
}

int32_t TypeOf(const WeightStack& stack) { return static_cast<int32_t>(stack.type); }

// Types that lie in device memory as they do in the file, if their rows need no padding.
bool NeedsRepack(const WeightStack& stack) {
  return ShapeOf(TypeOf(stack)).fields != 1 || DeviceRowBytes(TypeOf(stack), stack.cols) != stack.row_bytes;
}

uint64_t RepackedBytes(const WeightStack& stack) {
  const auto bytes = static_cast<uint64_t>(DeviceRowBytes(TypeOf(stack), stack.cols) * stack.rows);
  return (bytes + 255) / 256 * 256;
}

uint64_t RoundUp(uint64_t bytes) { return (bytes + 255) / 256 * 256; }

int64_t MiddlePairs(const model::ModelConfig& c, const StreamOptions& o) {
  return std::min(o.max_tokens * c.num_experts_per_tok, kMostMiddlePairs);
}

}  // namespace

StreamedExperts::StreamedExperts(std::vector<std::shared_ptr<const ShardWeights>> shards,
                                 const model::ModelConfig& config, const StreamOptions& options)
    : shards_(std::move(shards)),
      c_(config),
      options_(options),
      middle_pairs_(MiddlePairs(config, options)) {}

StreamedExperts::~StreamedExperts() {
  // What the stages hold may still be read, or written.
  cudaDeviceSynchronize();
  copier_.reset();
  calls_.reset();
  for (const Stage& s : stages_) {
    if (s.free != nullptr) cudaEventDestroy(s.free);
  }
  for (const cudaEvent_t e : {counted_, asked_, wait_begins_, wait_ends_}) {
    if (e != nullptr) cudaEventDestroy(e);
  }
}

absl::StatusOr<std::unique_ptr<StreamedExperts>> StreamedExperts::Create(
    std::vector<std::shared_ptr<const ShardWeights>> shards, const model::ModelConfig& config,
    const StreamOptions& options) {
  std::unique_ptr<StreamedExperts> out(new StreamedExperts(std::move(shards), config, options));
  TANDEM_RETURN_IF_ERROR(out->CheckTypes());
  TANDEM_RETURN_IF_ERROR(ToStatus(PrepareGroupedProducts(), "the kernels of streamed experts"));
  TANDEM_RETURN_IF_ERROR(out->Allocate());
  std::vector<std::span<const std::byte>> memories;
  for (const auto& shard : out->shards_) memories.push_back(shard->memory);
  TANDEM_ASSIGN_OR_RETURN(out->copier_, WeightCopier::Create(memories, options.copy));
  return out;
}

uint64_t StreamedExperts::DeviceBytes(const model::ModelConfig& c, const StreamOptions& o) {
  const auto tokens = static_cast<uint64_t>(o.max_tokens), k = static_cast<uint64_t>(c.num_experts_per_tok);
  const auto middle = static_cast<uint64_t>(MiddlePairs(c, o));
  constexpr uint64_t kPadding = 4096;  // of the pieces
  const uint64_t for_add = tokens * (static_cast<uint64_t>(c.hidden_size) * 2 + 4) +
                           middle * (static_cast<uint64_t>(c.moe_intermediate_size) * 6 + 4) + kPadding;
  // With the room for one group of weights in another order, which buffer_bytes hold otherwise.
  const bool in_scratch = for_add + kGroupBytes <= o.scratch_bytes;
  return o.buffer_bytes + tokens * k * 8 + (in_scratch ? 0 : for_add) +
         static_cast<uint64_t>(c.n_routed_experts) * 4 + kPadding;
}

absl::Status StreamedExperts::CheckTypes() const {
  for (const auto& shard : shards_) {
    for (const LayerWeights& layer : shard->layers) {
      for (int m = 0; m < kMatrices; ++m) {
        const WeightStack& s = StackOf(layer, m);
        if (IsDeviceType(TypeOf(s)) && TypeOf(s) != kF32 && s.cols % 32 == 0) continue;
        return absl::UnimplementedError(
            absl::StrCat("layer ", layer.layer, ": experts of type ", std::string(gguf::TypeName(s.type)),
                         " in rows of ", s.cols, " values cannot be multiplied on the GPU as they come"));
      }
    }
  }
  return absl::OkStatus();
}

template <typename Want>
void StreamedExperts::WantForAdd(const uint64_t (&repacked)[kMatrices], const Want& want) {
  want(&form_, options_.max_tokens * c_.hidden_size);
  want(&form_scale_, options_.max_tokens);
  want(&middle_, middle_pairs_ * c_.moe_intermediate_size);
  want(&middle_form_, middle_pairs_ * c_.moe_intermediate_size);
  want(&middle_scale_, middle_pairs_);
  for (int m = 0; m < kMatrices; ++m) {
    if (repacked[m] > 0) want(&repacked_[m], group_experts_ * static_cast<int64_t>(repacked[m]));
  }
}

absl::Status StreamedExperts::Allocate() {
  uint64_t repacked[kMatrices] = {};
  for (const auto& shard : shards_) {
    for (const LayerWeights& layer : shard->layers) {
      for (int m = 0; m < kMatrices; ++m) {
        const WeightStack& s = StackOf(layer, m);
        expert_bytes_[m] = std::max(expert_bytes_[m], (s.expert_bytes + 255) / 256 * 256);
        if (NeedsRepack(s)) repacked[m] = std::max(repacked[m], RepackedBytes(s));
      }
    }
  }
  const uint64_t one = expert_bytes_[0] + expert_bytes_[1] + expert_bytes_[2];
  const uint64_t one_repacked = repacked[0] + repacked[1] + repacked[2];
  if (one == 0) return absl::InvalidArgumentError("there are no routed experts to stream");
  // As many in a group as make a large copy, but at least three groups in the buffers where that can be.
  group_experts_ = static_cast<int64_t>(std::clamp<uint64_t>(kGroupBytes / one, 1, kMostGrouped));
  uint64_t for_add = 0;
  WantForAdd(repacked,
             [&](auto** p, int64_t n) { for_add += RoundUp(static_cast<uint64_t>(n) * sizeof **p); });
  const bool in_scratch = options_.scratch != nullptr && for_add <= options_.scratch_bytes;
  auto stages = [&] {
    const auto group = static_cast<uint64_t>(group_experts_);
    const uint64_t here = in_scratch ? 0 : group * one_repacked;
    const uint64_t left = options_.buffer_bytes - std::min(options_.buffer_bytes, here);
    return std::min<uint64_t>(left / (group * one), WeightCopier::kMostAtOnce - 1);
  };
  while (stages() < 3 && group_experts_ > 1) group_experts_ = (group_experts_ + 1) / 2;
  if (stages() < 2) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "streaming experts needs ", (2 * one + one_repacked) / 1000000 + 1,
        " MB of GPU memory for two of them, ", options_.buffer_bytes / 1000000, " MB are given"));
  }
  stages_.resize(stages());
  for (int m = 0; m < kMatrices; ++m) {
    for (Stage& s : stages_) {
      device_.Want(&s.data[m], group_experts_ * static_cast<int64_t>(expert_bytes_[m]));
    }
  }
  const int64_t pairs = options_.max_tokens * c_.num_experts_per_tok;
  device_.Want(&counts_, c_.n_routed_experts);
  device_.Want(&pair_token_, pairs);
  device_.Want(&pair_weight_, pairs);
  if (in_scratch) {
    uint8_t* at = options_.scratch;
    WantForAdd(repacked, [&at](auto** p, int64_t n) {
      *p = reinterpret_cast<std::remove_pointer_t<decltype(p)>>(at);
      at += RoundUp(static_cast<uint64_t>(n) * sizeof **p);
    });
  } else {
    WantForAdd(repacked, [this](auto** p, int64_t n) { device_.Want(p, n); });
  }
  host_.Want(&host_counts_, c_.n_routed_experts);
  TANDEM_RETURN_IF_ERROR(device_.Allocate("streaming experts"));
  TANDEM_RETURN_IF_ERROR(host_.Allocate("streaming experts"));
  for (Stage& s : stages_) {
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaEventCreateWithFlags(&s.free, cudaEventDisableTiming), "an event"));
    free_stages_.push_back(free_stages_.size());
  }
  for (cudaEvent_t* e : {&asked_, &wait_begins_, &wait_ends_}) {
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaEventCreate(e), "an event"));
  }
  // Waiting for it takes no CPU: the experts may be at work for others.
  return ToStatus(cudaEventCreateWithFlags(&counted_, cudaEventDisableTiming | cudaEventBlockingSync),
                  "an event");
}

std::string StreamedExperts::Description() const {
  return absl::StrFormat("%d x %d experts of %.1f MB in %.0f MB of GPU memory, %s", stages_.size(),
                         group_experts_,
                         static_cast<double>(expert_bytes_[0] + expert_bytes_[1] + expert_bytes_[2]) / 1e6,
                         static_cast<double>(device_.bytes()) / 1e6, copier_->Description());
}

uint64_t StreamedExperts::LayerBytes(int64_t layer) const {
  uint64_t bytes = 0;
  for (const auto& shard : shards_) {
    const LayerWeights* l = shard->Find(layer);
    for (int m = 0; l != nullptr && m < kMatrices; ++m) {
      bytes += StackOf(*l, m).used_bytes() * static_cast<uint64_t>(shard->experts());
    }
  }
  return bytes;
}

// Tokens by expert, and how many each has, to the host.
absl::Status StreamedExperts::Ask(const RoutedCall& call, cudaStream_t stream) {
  if (call.n < 1 || call.n > options_.max_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat(call.n, " tokens; from 1 to ", options_.max_tokens, " can be in a call"));
  }
  const auto experts = static_cast<size_t>(c_.n_routed_experts);
  SortPairsParams p;
  p.ids = call.ids;
  p.weights = call.weights;
  p.n = call.n;
  p.k = static_cast<int32_t>(c_.num_experts_per_tok);
  p.experts = static_cast<int32_t>(experts);
  p.counts = counts_;
  p.pair_token = pair_token_;
  p.pair_weight = pair_weight_;
  TANDEM_RETURN_IF_ERROR(ToStatus(LaunchSortPairs(p, stream), "tokens by expert"));
  TANDEM_RETURN_IF_ERROR(ToStatus(
      cudaMemcpyAsync(host_counts_, counts_, experts * sizeof(int32_t), cudaMemcpyDeviceToHost, stream),
      "tokens by expert"));
  return ToStatus(cudaEventRecord(counted_, stream), "tokens by expert");
}

std::vector<StreamedExperts::Group> StreamedExperts::GroupsOf(int64_t layer) const {
  std::vector<Group> out;
  for (size_t s = 0; s < shards_.size(); ++s) {
    if (shards_[s]->Find(layer) == nullptr) continue;
    const int64_t experts = shards_[s]->experts();
    for (int64_t first = 0; first < experts; first += group_experts_) {
      out.push_back({s, layer, first, std::min(group_experts_, experts - first)});
    }
  }
  return out;
}

int64_t StreamedExperts::PairsOf(const Group& g) const {
  const auto first = streamed_counts_.begin() + shards_[g.shard]->expert_begin + g.first;
  return std::accumulate(first, first + g.count, int64_t{0});
}

int64_t StreamedExperts::experts_ahead() const {
  return options_.copy_ahead ? static_cast<int64_t>(stages_.size()) * group_experts_ : 0;
}

void StreamedExperts::Share(std::unique_ptr<SharedCalls> calls, ChooseShared choose) {
  calls_ = std::move(calls);
  choose_ = std::move(choose);
}

// Calls the processes for some experts, and leaves the others in streamed_counts_.
absl::Status StreamedExperts::ShareOut(const RoutedCall& call, const std::vector<Group>& groups,
                                       cudaStream_t stream) {
  const auto experts = static_cast<size_t>(c_.n_routed_experts);
  streamed_counts_.assign(host_counts_, host_counts_ + experts);
  ++totals_.layers;
  totals_.used +=
      std::count_if(streamed_counts_.begin(), streamed_counts_.end(), [](int32_t n) { return n > 0; });
  if (calls_ == nullptr || call.n > calls_->max_tokens()) return absl::OkStatus();
  std::vector<bool> ahead(experts);
  for (size_t i = 0; options_.copy_ahead && i < std::min(groups.size(), stages_.size()); ++i) {
    const int64_t first = shards_[groups[i].shard]->expert_begin + groups[i].first;
    std::fill_n(ahead.begin() + first, groups[i].count, true);
  }
  const std::vector<bool> shared = choose_(call.n, streamed_counts_, ahead);
  int64_t given = 0;
  for (size_t e = 0; e < experts; ++e) {
    if (!shared[e] || streamed_counts_[e] == 0) continue;
    totals_.shared_pairs += streamed_counts_[e];
    streamed_counts_[e] = 0;
    ++given;
  }
  if (given == 0) return absl::OkStatus();
  totals_.shared += given;
  TANDEM_RETURN_IF_ERROR(ToStatus(cudaEventRecord(asked_, stream), "streamed experts"));
  return calls_->Ask(call, shared, stream);
}

// After the device has come past the last layer's sums.
absl::Status StreamedExperts::FinishShared() {
  if (calls_ == nullptr || !calls_->open()) return absl::OkStatus();
  TANDEM_ASSIGN_OR_RETURN(const double processes, calls_->Finish());
  float worked = 0, waited = 0;  // milliseconds
  TANDEM_RETURN_IF_ERROR(ToStatus(cudaEventElapsedTime(&worked, asked_, wait_begins_), "streamed experts"));
  TANDEM_RETURN_IF_ERROR(
      ToStatus(cudaEventElapsedTime(&waited, wait_begins_, wait_ends_), "streamed experts"));
  totals_.worked += 1e-3 * worked;
  totals_.waited += 1e-3 * waited;
  totals_.processes += processes;
  return absl::OkStatus();
}

absl::StatusOr<StreamedExperts::Totals> StreamedExperts::End() {
  TANDEM_RETURN_IF_ERROR(FinishShared());
  return totals_;
}

absl::Status StreamedExperts::Fetch(const Group& g, bool all) {
  const ShardWeights& shard = *shards_[g.shard];
  const LayerWeights& layer = *shard.Find(g.layer);
  const size_t index = free_stages_.front();
  free_stages_.pop_front();
  const Stage& stage = stages_[index];
  std::vector<CopyPiece> pieces;
  for (int m = 0; m < kMatrices; ++m) {
    const WeightStack& s = StackOf(layer, m);
    for (int64_t i = 0; i < g.count; ++i) {
      if (!all && streamed_counts_[static_cast<size_t>(shard.expert_begin + g.first + i)] == 0) continue;
      const auto at = static_cast<uint64_t>(i);
      const std::byte* from = s.data + (static_cast<uint64_t>(g.first) + at) * s.expert_bytes;
      // Neighbours lie as in the arena, and travel together; nothing is read behind the last one.
      CopyPiece* before = pieces.empty() ? nullptr : &pieces.back();
      uint8_t* to = stage.data[m] + at * s.expert_bytes;
      if (before != nullptr && before->to + (s.expert_bytes - s.used_bytes()) + before->bytes == to &&
          before->from + (s.expert_bytes - s.used_bytes()) + before->bytes == from) {
        before->bytes += s.expert_bytes;
      } else {
        pieces.push_back({from, to, s.used_bytes()});
      }
    }
  }
  TANDEM_ASSIGN_OR_RETURN(const uint64_t ticket, copier_->Copy(std::move(pieces), stage.free));
  fetched_.push_back({g, index, ticket});
  return absl::OkStatus();
}

void StreamedExperts::Release() {
  free_stages_.push_back(fetched_.front().stage);
  fetched_.pop_front();
}

absl::Status StreamedExperts::Begin() {
  totals_ = Totals();
  if (!options_.copy_ahead || shards_.empty() || shards_.front()->layers.empty()) return absl::OkStatus();
  const std::vector<Group> groups = GroupsOf(shards_.front()->layers.front().layer);
  if (!fetched_.empty() && fetched_.front().group == groups.front()) return absl::OkStatus();
  while (!fetched_.empty()) Release();
  for (size_t i = 0; i < groups.size() && !free_stages_.empty(); ++i) {
    TANDEM_RETURN_IF_ERROR(Fetch(groups[i], true));
  }
  return absl::OkStatus();
}

absl::Status StreamedExperts::Add(const RoutedCall& call, cudaStream_t stream) {
  std::vector<Group> groups = GroupsOf(call.layer);
  if (groups.empty()) {
    return absl::NotFoundError(absl::StrCat("layer ", call.layer, " is not held by any expert process"));
  }
  TANDEM_RETURN_IF_ERROR(ToStatus(cudaEventSynchronize(counted_), "the layers before the experts"));
  TANDEM_RETURN_IF_ERROR(FinishShared());
  TANDEM_RETURN_IF_ERROR(ShareOut(call, groups, stream));
  const auto experts = static_cast<size_t>(c_.n_routed_experts);
  first_pair_.assign(experts + 1, 0);
  for (size_t e = 0; e < experts; ++e) first_pair_[e + 1] = first_pair_[e] + host_counts_[e];
  std::erase_if(groups, [&](const Group& g) { return PairsOf(g) == 0; });
  if (!groups.empty()) {
    QuantizeParams form;
    form.x = call.normed;
    form.x_stride = form.cols = c_.hidden_size;
    form.rows = call.n;
    form.h = form_;
    form.h_scale = form_scale_;
    TANDEM_RETURN_IF_ERROR(ToStatus(LaunchToHalf(form, stream), "activations"));
  }
  const std::vector<Group> ahead =
      options_.copy_ahead ? GroupsOf(call.layer + 1) : std::vector<Group>();  // none after the last layer

  // What was copied ahead comes first, in the order of the groups; what of it nobody wants is passed over.
  std::erase_if(fetched_, [&](const Fetched& f) {
    const bool wanted = std::find(groups.begin(), groups.end(), f.group) != groups.end();
    if (!wanted) free_stages_.push_back(f.stage);
    return !wanted;
  });
  size_t asked = fetched_.size();  // groups whose copies have begun; then those of the next layer
  auto fetch_more = [&]() -> absl::Status {
    while (!free_stages_.empty() && asked < groups.size() + ahead.size()) {
      const bool now = asked < groups.size();
      TANDEM_RETURN_IF_ERROR(Fetch(now ? groups[asked] : ahead[asked - groups.size()], !now));
      ++asked;
    }
    return absl::OkStatus();
  };
  for (size_t i = 0; i < groups.size(); ++i) {
    TANDEM_RETURN_IF_ERROR(fetch_more());
    TANDEM_RETURN_IF_ERROR(Multiply(call, fetched_.front(), stream));
    TANDEM_RETURN_IF_ERROR(
        ToStatus(cudaEventRecord(stages_[fetched_.front().stage].free, stream), "streamed experts"));
    Release();
  }
  if (calls_ != nullptr && calls_->open()) {
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaEventRecord(wait_begins_, stream), "streamed experts"));
    TANDEM_RETURN_IF_ERROR(calls_->Add(call, stream));
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaEventRecord(wait_ends_, stream), "streamed experts"));
  }
  return fetch_more();
}

absl::Status StreamedExperts::Repack(const Fetched& f, int matrix, GroupedWeights* out, cudaStream_t stream) {
  const ShardWeights& shard = *shards_[f.group.shard];
  const WeightStack& s = StackOf(*shard.Find(f.group.layer), matrix);
  const uint8_t* raw = stages_[f.stage].data[matrix];
  const bool repack = NeedsRepack(s);
  out->type = TypeOf(s);
  out->row_bytes = DeviceRowBytes(out->type, s.cols);
  for (int64_t i = 0; i < f.group.count; ++i) {
    const auto at = static_cast<uint64_t>(i);
    out->data[i] = raw + at * s.expert_bytes;
    if (!repack || streamed_counts_[static_cast<size_t>(shard.expert_begin + f.group.first + i)] == 0)
      continue;
    uint8_t* to = repacked_[matrix] + at * RepackedBytes(s);
    TANDEM_RETURN_IF_ERROR(
        ToStatus(LaunchRepack({out->type, out->data[i], to, s.rows, s.cols}, stream), "streamed experts"));
    out->data[i] = to;
  }
  return absl::OkStatus();
}

absl::Status StreamedExperts::Multiply(const RoutedCall& call, const Fetched& f, cudaStream_t stream) {
  TANDEM_RETURN_IF_ERROR(copier_->Await(f.ticket, stream));
  GroupedWeights w[kMatrices];
  for (int m = 0; m < kMatrices; ++m) TANDEM_RETURN_IF_ERROR(Repack(f, m, &w[m], stream));
  const int64_t first_expert = shards_[f.group.shard]->expert_begin + f.group.first;
  const int64_t begin = first_pair_[static_cast<size_t>(first_expert)];
  const int64_t pairs = first_pair_[static_cast<size_t>(first_expert + f.group.count)] - begin;
  for (int64_t at = 0; at < pairs; at += middle_pairs_) {
    TANDEM_RETURN_IF_ERROR(
        Products(call, f.group, w, begin + at, std::min(middle_pairs_, pairs - at), stream));
  }
  return absl::OkStatus();
}

// Pairs [first_pair, first_pair + pairs), all of the group; those of shared experts are passed over.
absl::Status StreamedExperts::Products(const RoutedCall& call, const Group& g,
                                       const GroupedWeights (&w)[kMatrices], int64_t first_pair,
                                       int64_t pairs, cudaStream_t stream) {
  const ShardWeights& shard = *shards_[g.shard];
  GateUpParams p;
  p.gate = w[0];
  p.up = w[1];
  p.h = form_;
  p.h_scale = form_scale_;
  p.pair_token = pair_token_ + first_pair;
  p.middle = middle_;
  p.hidden = static_cast<int32_t>(c_.hidden_size);
  p.inner = static_cast<int32_t>(shard.row_end - shard.row_begin);
  p.experts = static_cast<int32_t>(g.count);
  for (int64_t i = 0; i < g.count; ++i) {
    const auto e = static_cast<size_t>(shard.expert_begin + g.first + i);
    const int64_t begin = std::clamp(first_pair_[e] - first_pair, int64_t{0}, pairs);
    const int64_t end = std::clamp(first_pair_[e + 1] - first_pair, int64_t{0}, pairs);
    p.begin[i] = static_cast<int32_t>(begin);
    p.count[i] = streamed_counts_[e] == 0 ? 0 : static_cast<int32_t>(end - begin);
  }
  TANDEM_RETURN_IF_ERROR(ToStatus(LaunchGateUp(p, stream), "gate and up of streamed experts"));
  QuantizeParams form;
  form.x = middle_;
  form.x_stride = form.cols = p.inner;
  form.rows = pairs;
  form.h = middle_form_;
  form.h_scale = middle_scale_;
  TANDEM_RETURN_IF_ERROR(ToStatus(LaunchToHalf(form, stream), "activations"));
  bool another = false;
  for (int64_t i = 0; i < g.count; ++i) {
    DownParams d;
    d.type = w[2].type;
    d.row_bytes = w[2].row_bytes;
    d.data = w[2].data[i];
    d.h = middle_form_ + int64_t{p.begin[i]} * p.inner;
    d.h_scale = middle_scale_ + p.begin[i];
    d.pair_token = p.pair_token + p.begin[i];
    d.pair_weight = pair_weight_ + first_pair + p.begin[i];
    d.x = call.x;
    d.hidden = p.hidden;
    d.inner = p.inner;
    d.count = p.count[i];
    d.after_another = another;
    another = another || d.count > 0;
    TANDEM_RETURN_IF_ERROR(ToStatus(LaunchDown(d, stream), "down of streamed experts"));
  }
  return absl::OkStatus();
}

absl::StatusOr<double> StreamedExperts::MeasureCopy(uint64_t bytes) {
  const std::vector<Group> groups = GroupsOf(shards_.front()->layers.front().layer);
  auto bytes_of = [&](const Group& g) {
    const LayerWeights& layer = *shards_[g.shard]->Find(g.layer);
    uint64_t sum = 0;
    for (int m = 0; m < kMatrices; ++m) {
      sum += StackOf(layer, m).used_bytes() * static_cast<uint64_t>(g.count);
    }
    return sum;
  };
  const uint64_t rounds = std::max<uint64_t>(bytes / bytes_of(groups.front()), 2);
  cudaStream_t stream = nullptr;
  TANDEM_RETURN_IF_ERROR(ToStatus(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream"));
  while (!fetched_.empty()) Release();
  uint64_t next = 0, copied = 0;
  auto copy = [&](uint64_t count) -> absl::Status {
    for (uint64_t i = 0; i < count; ++i, ++next) {
      const Group& group = groups[next % groups.size()];
      TANDEM_RETURN_IF_ERROR(Fetch(group, true));
      TANDEM_RETURN_IF_ERROR(copier_->Await(fetched_.front().ticket, stream));
      Release();
      copied += bytes_of(group);
    }
    return ToStatus(cudaStreamSynchronize(stream), "copying weights");
  };
  absl::Status status = copy(1);  // the first one finds everything cold
  copied = 0;
  const absl::Time begin = absl::Now();
  if (status.ok()) status = copy(rounds);
  const double seconds = absl::ToDoubleSeconds(absl::Now() - begin);
  cudaStreamDestroy(stream);
  TANDEM_RETURN_IF_ERROR(status);
  return static_cast<double>(copied) / seconds;
}

}  // namespace tandem::attention::cuda
