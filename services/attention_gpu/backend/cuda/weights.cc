#include "services/attention_gpu/backend/cuda/weights.h"

#include <algorithm>
#include <cstring>
#include <span>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/model/tensors.h"
#include "common/quant/quant.h"

namespace tandem::attention::cuda {
namespace {

using gguf::TensorType;
using kernels::Matrix;

// The type a matrix has on the device.
int32_t DeviceType(TensorType type) {
  const auto id = static_cast<int32_t>(type);
  return IsDeviceType(id) ? id : int32_t{kF16};
}

uint64_t Aligned(uint64_t bytes) { return (bytes + 255) / 256 * 256; }

uint64_t DeviceBytes(TensorType type, int64_t rows, int64_t cols) {
  return Aligned(static_cast<uint64_t>(DeviceRowBytes(DeviceType(type), cols) * rows));
}

absl::Status CheckCols(const gguf::Tensor& t) {
  if (t.n_dims < 2 || t.ne[0] % 32 == 0) return absl::OkStatus();
  return absl::UnimplementedError(absl::StrCat("the CUDA backend needs rows of a multiple of 32 values; ",
                                               t.name, " has ", t.ne[0],
                                               " (--gpu none computes on the CPU)"));
}

// Copies host memory to the device in pieces, the next one being copied while the last is on its way.
class Uploader {
 public:
  absl::Status Init() {
    for (Half& h : halves_) {
      pinned_.Want(&h.host, kPiece);
      device_.Want(&h.device, kPiece);
    }
    TANDEM_RETURN_IF_ERROR(pinned_.Allocate("loading"));
    TANDEM_RETURN_IF_ERROR(device_.Allocate("loading"));
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"));
    for (Half& h : halves_) {
      TANDEM_RETURN_IF_ERROR(ToStatus(cudaEventCreateWithFlags(&h.free, cudaEventDisableTiming), "an event"));
    }
    return absl::OkStatus();
  }
  ~Uploader() {
    if (stream_ != nullptr) cudaStreamSynchronize(stream_);
    for (Half& h : halves_) {
      if (h.free != nullptr) cudaEventDestroy(h.free);
    }
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  // `rows` rows of m to dst, rows of the device type. Widened to F16 where that is another.
  absl::Status Rows(const Matrix& m, uint8_t* dst) {
    const int32_t type = DeviceType(m.type);
    const bool widen = type != static_cast<int32_t>(m.type);
    const int64_t row_bytes = widen ? m.cols * 2 : gguf::RowBytes(m.type, m.cols);
    const int64_t device_row = DeviceRowBytes(type, m.cols);
    const int64_t most = std::max<int64_t>(kPiece / row_bytes, 1);
    if (row_bytes > kPiece) return absl::InvalidArgumentError("a weight's row is larger than 32 MiB");
    std::vector<float> values(widen ? m.cols : 0);
    for (int64_t at = 0; at < m.rows; at += most) {
      const int64_t n = std::min(most, m.rows - at);
      TANDEM_ASSIGN_OR_RETURN(Half * half, Next());
      if (!widen && m.row_bytes == row_bytes) {
        std::memcpy(half->host, m.data + at * row_bytes, n * row_bytes);
      } else {
        for (int64_t r = 0; r < n; ++r) {
          const uint8_t* from = m.data + (at + r) * m.row_bytes;
          uint8_t* to = half->host + r * row_bytes;
          if (!widen) {
            std::memcpy(to, from, row_bytes);
            continue;
          }
          quant::Dequantize(m.type, from, values.data(), m.cols);
          for (int64_t i = 0; i < m.cols; ++i) {
            const uint16_t h = quant::FloatToHalf(values[i]);
            std::memcpy(to + 2 * i, &h, sizeof h);
          }
        }
      }
      TANDEM_RETURN_IF_ERROR(
          ToStatus(cudaMemcpyAsync(half->device, half->host, n * row_bytes, cudaMemcpyHostToDevice, stream_),
                   "loading"));
      RepackParams p;
      p.type = type;
      p.src = half->device;
      p.dst = dst + at * device_row;
      p.rows = n;
      p.cols = m.cols;
      TANDEM_RETURN_IF_ERROR(ToStatus(LaunchRepack(p, stream_), "loading"));
      TANDEM_RETURN_IF_ERROR(ToStatus(cudaEventRecord(half->free, stream_), "loading"));
    }
    return absl::OkStatus();
  }
  absl::Status Finish() { return ToStatus(cudaStreamSynchronize(stream_), "loading the weights"); }

 private:
  static constexpr int64_t kPiece = int64_t{32} << 20;
  struct Half {
    uint8_t* host = nullptr;
    uint8_t* device = nullptr;
    cudaEvent_t free = nullptr;
  };
  absl::StatusOr<Half*> Next() {
    Half& h = halves_[turn_++ % 2];
    TANDEM_RETURN_IF_ERROR(ToStatus(cudaEventSynchronize(h.free), "loading"));
    return &h;
  }

  Arena pinned_{Arena::Kind::kPinnedHost}, device_{Arena::Kind::kDevice};
  Half halves_[2];
  cudaStream_t stream_ = nullptr;
  uint64_t turn_ = 0;
};

}  // namespace

// Notes where everything goes, then allocates, then uploads.
class WeightsLoader {
 public:
  explicit WeightsLoader(DeviceWeights& weights) : w_(weights) {}

  void Add(const Matrix& m, DeviceMatrix* to) { AddHeads({&m, 1}, to); }
  // To page-locked memory that the device reads, and to which it writes while it lays out the rows.
  void AddToHost(const Matrix& m, DeviceMatrix* to) { AddParts({&m, 1}, to, &w_.host_arena_); }
  // Matrices of one shape and type one after the other; `to` describes the first.
  void AddHeads(std::span<const Matrix> parts, DeviceMatrix* to) { AddParts(parts, to, &w_.arena_); }
  void AddFloats(const float* values, int64_t n, const float** to) {
    if (values == nullptr) return;
    w_.arena_.Want(const_cast<float**>(to), n);
    floats_.push_back({values, n, to});
  }

  absl::Status Run() {
    TANDEM_RETURN_IF_ERROR(w_.arena_.Allocate("the weights"));
    TANDEM_RETURN_IF_ERROR(w_.host_arena_.Allocate("the token embedding"));
    Uploader uploader;
    TANDEM_RETURN_IF_ERROR(uploader.Init());
    for (const Job& job : jobs_) {
      uint8_t* to = *job.to;
      for (const Matrix& m : job.parts) {
        TANDEM_RETURN_IF_ERROR(uploader.Rows(m, to));
        to += DeviceRowBytes(DeviceType(m.type), m.cols) * m.rows;
      }
    }
    TANDEM_RETURN_IF_ERROR(uploader.Finish());
    for (const Floats& f : floats_) {
      TANDEM_RETURN_IF_ERROR(ToStatus(
          cudaMemcpy(const_cast<float*>(*f.to), f.values, f.n * sizeof(float), cudaMemcpyHostToDevice),
          "loading"));
    }
    return absl::OkStatus();
  }

 private:
  void AddParts(std::span<const Matrix> parts, DeviceMatrix* to, Arena* arena) {
    const Matrix& m = parts.front();
    to->type = DeviceType(m.type);
    to->rows = m.rows;
    to->cols = m.cols;
    to->row_bytes = DeviceRowBytes(to->type, m.cols);
    arena->Want(const_cast<uint8_t**>(&to->data),
                to->row_bytes * m.rows * static_cast<int64_t>(parts.size()));
    jobs_.push_back(
        {std::vector<Matrix>(parts.begin(), parts.end()), const_cast<uint8_t* const*>(&to->data)});
  }
  struct Job {
    std::vector<Matrix> parts;
    uint8_t* const* to;
  };
  struct Floats {
    const float* values;
    int64_t n;
    const float** to;
  };
  DeviceWeights& w_;
  std::vector<Job> jobs_;
  std::vector<Floats> floats_;
};

absl::StatusOr<uint64_t> DeviceWeights::Plan(const gguf::File& file, const model::ModelConfig& c) {
  TANDEM_ASSIGN_OR_RETURN(const model::ModelTensors tensors, model::BindTensors(file, c));
  uint64_t bytes = 0;
  absl::Status status;
  auto add = [&](const gguf::Tensor* t) {
    if (t == nullptr) return;
    status.Update(CheckCols(*t));
    bytes += DeviceBytes(t->type, t->ne[1] * t->ne[2] * t->ne[3], t->ne[0]);
  };
  add(tensors.output_norm);
  add(tensors.output);
  status.Update(CheckCols(*tensors.token_embd));
  for (const model::LayerTensors& l : tensors.layers) {
    for (const gguf::Tensor* t :
         {l.attn_norm, l.attn_q, l.attn_q_a, l.attn_q_a_norm, l.attn_q_b, l.attn_kv_a_mqa, l.attn_kv_a_norm,
          l.attn_k_b, l.attn_v_b, l.attn_output, l.ffn_norm, l.dense.gate, l.dense.up, l.dense.down,
          l.shared.gate, l.shared.up, l.shared.down, l.ffn_gate_inp, l.exp_probs_b}) {
      add(t);
    }
    if (l.attn_kv_b != nullptr) {
      status.Update(CheckCols(*l.attn_kv_b));
      const int64_t heads = c.num_attention_heads;
      bytes += DeviceBytes(TensorType::kF16, heads * c.kv_lora_rank, c.qk_nope_head_dim);
      bytes += DeviceBytes(l.attn_kv_b->type, heads * c.v_head_dim, c.kv_lora_rank);
      if (c.qk_nope_head_dim % 32 != 0) {
        status.Update(absl::UnimplementedError(
            absl::StrCat("the CUDA backend needs a qk_nope_head_dim that is a multiple of 32, not ",
                         c.qk_nope_head_dim, " (--gpu none computes on the CPU)")));
      }
    }
  }
  TANDEM_RETURN_IF_ERROR(status);
  return bytes;
}

absl::StatusOr<std::unique_ptr<DeviceWeights>> DeviceWeights::Load(const gguf::File& file,
                                                                   const model::ModelConfig& c,
                                                                   threading::ThreadPool& pool) {
  TANDEM_ASSIGN_OR_RETURN(const CpuWeights host, CpuWeights::Load(file, c, kernels::Precision::kFast, pool));
  std::unique_ptr<DeviceWeights> w(new DeviceWeights);
  WeightsLoader loader(*w);
  loader.AddFloats(host.output_norm, c.hidden_size, &w->output_norm);
  const bool tied = host.head.data == host.embedding.data;
  loader.Add(host.head, &w->head);
  if (!tied) loader.AddToHost(host.embedding, &w->embedding);
  w->layers.resize(host.layers.size());  // before anything points into it
  for (size_t i = 0; i < host.layers.size(); ++i) {
    const CpuLayer& from = host.layers[i];
    DeviceLayer& to = w->layers[i];
    loader.AddFloats(from.attn_norm, c.hidden_size, &to.attn_norm);
    if (c.q_lora_rank > 0) {
      loader.Add(from.q_a, &to.q_a);
      loader.AddFloats(from.q_a_norm, c.q_lora_rank, &to.q_a_norm);
      loader.Add(from.q_b, &to.q_b);
    } else {
      loader.Add(from.q, &to.q);
    }
    loader.Add(from.kv_a, &to.kv_a);
    loader.AddFloats(from.kv_a_norm, c.kv_lora_rank, &to.kv_a_norm);
    loader.AddHeads(from.k_b, &to.k_b);
    loader.AddHeads(from.v_b, &to.v_b);
    loader.Add(from.output, &to.output);
    loader.AddFloats(from.ffn_norm, c.hidden_size, &to.ffn_norm);
    to.has_ffn = from.has_ffn;
    if (from.has_ffn) {
      loader.Add(from.ffn.gate, &to.ffn.gate);
      loader.Add(from.ffn.up, &to.ffn.up);
      loader.Add(from.ffn.down, &to.ffn.down);
    }
    if (from.router.data != nullptr) loader.Add(from.router, &to.router);
    loader.AddFloats(from.router_bias, c.n_routed_experts, &to.router_bias);
  }
  TANDEM_RETURN_IF_ERROR(loader.Run());
  if (tied) w->embedding = w->head;
  return w;
}

}  // namespace tandem::attention::cuda
