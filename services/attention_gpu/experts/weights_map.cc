#include "services/attention_gpu/experts/weights_map.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include <grpcpp/grpcpp.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/checked_math.h"
#include "common/base/status_macros.h"
#include "common/rpc/channel.h"
#include "common/shm/handover.h"
#include "common/shm/memory.h"
#include "tandem/v1/experts.grpc.pb.h"

namespace tandem::attention {
namespace {

constexpr uint64_t kAlignment = 64;

template <typename... Text>
absl::Status Refused(const Text&... text) {
  return absl::FailedPreconditionError(absl::StrCat("the offered weights: ", text...));
}

absl::StatusOr<WeightStack> Place(const v1::WeightStack& from, int64_t rows, int64_t cols, int64_t experts,
                                  std::span<const std::byte> memory) {
  WeightStack to;
  to.type = static_cast<gguf::TensorType>(from.type());
  const gguf::TypeInfo info = gguf::GetTypeInfo(to.type);
  if (!info.supported || cols % info.block_size != 0) {
    return Refused("rows of ", cols, " values do not fit the type ", from.type());
  }
  to.rows = rows;
  to.cols = cols;
  to.row_bytes = gguf::RowBytes(to.type, cols);
  to.expert_bytes = from.expert_bytes();
  if (from.row_bytes() != static_cast<uint64_t>(to.row_bytes) || to.expert_bytes < to.used_bytes() ||
      to.expert_bytes % kAlignment != 0 || from.offset() % kAlignment != 0) {
    return Refused("rows of ", from.row_bytes(), " bytes, experts of ", to.expert_bytes, " at ",
                   from.offset(), " where ", rows, " rows of ", to.row_bytes, " bytes are expected");
  }
  const auto all = CheckedMul<uint64_t>(to.expert_bytes, static_cast<uint64_t>(experts));
  const auto end = all ? CheckedAdd<uint64_t>(from.offset(), *all) : std::nullopt;
  if (!end || *end > memory.size()) {
    return Refused(experts, " experts of ", to.expert_bytes, " bytes at ", from.offset(),
                   " are beyond the file's ", memory.size());
  }
  to.data = memory.data() + from.offset();
  return to;
}

}  // namespace

absl::StatusOr<ShardWeights> PlaceWeights(const v1::WeightsOffer& offer, const model::ModelConfig& c,
                                          std::span<const std::byte> memory) {
  ShardWeights out;
  out.memory = memory;
  out.expert_begin = offer.expert_begin();
  out.expert_end = offer.expert_end();
  out.row_begin = offer.row_begin();
  out.row_end = offer.row_end();
  if (out.expert_begin >= out.expert_end || out.expert_end > c.n_routed_experts ||
      out.row_begin >= out.row_end || out.row_end > c.moe_intermediate_size) {
    return Refused("experts [", out.expert_begin, ", ", out.expert_end, ") and rows [", out.row_begin, ", ",
                   out.row_end, "); the model has ", c.n_routed_experts, " and ", c.moe_intermediate_size);
  }
  const int64_t rows = out.row_end - out.row_begin;
  for (const v1::LayerWeights& from : offer.layers()) {
    LayerWeights to;
    to.layer = from.layer();
    if (!c.IsMoe(to.layer) || to.layer >= c.num_hidden_layers ||
        (!out.layers.empty() && to.layer <= out.layers.back().layer)) {
      return Refused("layer ", to.layer, " is none of the model's MoE layers, or comes out of order");
    }
    const std::string where = absl::StrCat("layer ", to.layer);
    auto place = [&](const v1::WeightStack& stack, int64_t r, int64_t cols) -> absl::StatusOr<WeightStack> {
      auto placed = Place(stack, r, cols, out.experts(), memory);
      if (!placed.ok()) return Annotate(placed.status(), where);
      return placed;
    };
    TANDEM_ASSIGN_OR_RETURN(to.gate, place(from.gate(), rows, c.hidden_size));
    TANDEM_ASSIGN_OR_RETURN(to.up, place(from.up(), rows, c.hidden_size));
    TANDEM_ASSIGN_OR_RETURN(to.down, place(from.down(), c.hidden_size, rows));
    out.layers.push_back(to);
  }
  if (static_cast<int64_t>(out.layers.size()) != c.num_moe_layers()) {
    return Refused(out.layers.size(), " layers; the model has ", c.num_moe_layers(), " MoE layers");
  }
  return out;
}

absl::StatusOr<std::unique_ptr<WeightsMap>> WeightsMap::Open(const std::shared_ptr<grpc::Channel>& channel,
                                                             const model::ModelConfig& config,
                                                             const std::string& model_fingerprint,
                                                             absl::Duration patience) {
  const absl::Time deadline = absl::Now() + patience;
  v1::WeightsOffer offer;
  {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(deadline));
    v1::Experts::Stub stub(channel);
    const absl::Status answer = rpc::FromGrpc(stub.Weights(&context, {}, &offer));
    if (absl::IsUnimplemented(answer)) return Refused("the process does not know the call (older version)");
    TANDEM_RETURN_IF_ERROR(answer);
  }
  if (offer.model_fingerprint() != model_fingerprint) return Refused("they are another model's");
  absl::StatusOr<shm::FileDescriptor> fd =
      shm::ReceiveDescriptor(offer.socket_path(), offer.token(), deadline - absl::Now());
  // A process that can be called but whose socket cannot be reached is on another host, or in a container.
  if (!fd.ok()) return Refused(std::string(fd.status().message()));
  const int seals = fcntl(fd->get(), F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return Refused("the file may shrink, which would end this process at the next access");
  }
  struct stat info {};
  if (fstat(fd->get(), &info) != 0 || info.st_size <= 0) return Refused("a file without a size");
  const auto bytes = static_cast<size_t>(info.st_size);
  void* data = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd->get(), 0);
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("mapping ", bytes, " bytes of weights: ", std::strerror(errno)));
  }
  std::unique_ptr<WeightsMap> out(new WeightsMap());
  out->weights_.memory = {static_cast<const std::byte*>(data), bytes};  // to be unmapped, whatever comes next
  madvise(data, bytes, MADV_HUGEPAGE);                                  // best effort
  TANDEM_ASSIGN_OR_RETURN(out->weights_, PlaceWeights(offer, config, out->weights_.memory));
  return out;
}

WeightsMap::~WeightsMap() {
  if (!weights_.memory.empty()) {
    munmap(const_cast<std::byte*>(weights_.memory.data()), weights_.memory.size());
  }
}

}  // namespace tandem::attention
