#include "cli/synth/synth.h"

#include <signal.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <ostream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/synth/random_blocks.h"
#include "cli/synth/vocabulary.h"
#include "cli/util/format.h"
#include "common/base/status_macros.h"
#include "common/threading/thread_pool.h"

namespace tandem::cli {
namespace {

using gguf::ValueType;
using gguf::Writer;

// Blocks that a thread fills at a time.
constexpr int64_t kFillGrain = 2048;
// What a file takes beside its tensors: metadata, vocabulary, alignment.
constexpr uint64_t kHeaderBytes = uint64_t{16} << 20;

// "40G", "500M", "123456": powers of 1000. 0: not such a size.
uint64_t ParseSize(const std::string& text) {
  uint64_t number = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc() || number > 1'000'000'000'000) return 0;
  const std::string unit(stop, end);
  if (unit.empty()) return number;
  if (unit == "M") return number * 1'000'000;
  if (unit == "G") return number > 1'000'000 ? 0 : number * 1'000'000'000;
  return 0;
}

void AddMetadata(const SynthPlan& plan, const SynthOptions& options, const TypeScheme& types,
                 const SynthVocabulary& vocabulary, Writer& w) {
  const model::ModelConfig& c = plan.config;
  const bool mla = options.layout == "mla";
  const auto u32 = [&w](const char* key, int64_t value) {
    w.AddUint(absl::StrCat("deepseek2.", key), static_cast<uint64_t>(value));
  };
  const auto f32 = [&w](const char* key, double value) {
    w.AddFloat(absl::StrCat("deepseek2.", key), static_cast<float>(value));
  };
  w.AddString("general.architecture", "deepseek2");
  w.AddString("general.type", "model");
  w.AddString("general.name",
              absl::StrCat("synthetic ", options.shape, " ", options.type, ", ", c.first_k_dense_replace,
                           " dense and ", c.num_moe_layers(), " MoE layers of ", c.n_routed_experts,
                           " experts, seed ", options.seed));
  u32("block_count", c.num_hidden_layers);
  u32("context_length", c.max_position_embeddings);
  u32("embedding_length", c.hidden_size);
  u32("feed_forward_length", c.intermediate_size);
  u32("attention.head_count", c.num_attention_heads);
  u32("attention.head_count_kv", mla ? 1 : c.num_attention_heads);
  f32("rope.freq_base", c.rope_theta);
  f32("attention.layer_norm_rms_epsilon", c.rms_norm_eps);
  u32("expert_used_count", c.num_experts_per_tok);
  if (c.n_group > 1) {
    u32("expert_group_count", c.n_group);
    u32("expert_group_used_count", c.topk_group);
  }
  u32("leading_dense_block_count", c.first_k_dense_replace);
  u32("vocab_size", c.vocab_size);
  if (c.q_lora_rank > 0) u32("attention.q_lora_rank", c.q_lora_rank);
  u32("attention.kv_lora_rank", c.kv_lora_rank);
  u32("attention.key_length", mla ? c.latent_dim() : c.qk_head_dim());
  u32("attention.value_length", mla ? c.kv_lora_rank : c.v_head_dim);
  if (mla) {
    u32("attention.key_length_mla", c.qk_head_dim());
    u32("attention.value_length_mla", c.v_head_dim);
  }
  u32("expert_feed_forward_length", c.moe_intermediate_size);
  u32("expert_count", c.n_routed_experts);
  u32("expert_shared_count", c.n_shared_experts);
  f32("expert_weights_scale", c.routed_scaling_factor);
  w.AddBool("deepseek2.expert_weights_norm", c.norm_topk_prob);
  u32("expert_gating_func", c.scoring_func == model::ScoringFunc::kSigmoid ? 2 : 1);
  u32("rope.dimension_count", c.qk_rope_head_dim);
  if (c.rope_scaling.factor != 1) {
    w.AddString("deepseek2.rope.scaling.type", "yarn");
    f32("rope.scaling.factor", c.rope_scaling.factor);
    u32("rope.scaling.original_context_length", c.rope_scaling.original_max_position_embeddings);
    f32("rope.scaling.yarn_log_multiplier", 0.1 * c.rope_scaling.mscale_all_dim);
  }
  w.AddString("tokenizer.ggml.model", "gpt2");
  w.AddString("tokenizer.ggml.pre", "deepseek-v3");
  w.AddStrings("tokenizer.ggml.tokens", vocabulary.tokens);
  w.AddInts("tokenizer.ggml.token_type", vocabulary.types);
  w.AddStrings("tokenizer.ggml.merges", vocabulary.merges);
  w.AddUint("tokenizer.ggml.bos_token_id", static_cast<uint64_t>(vocabulary.bos_id));
  w.AddUint("tokenizer.ggml.eos_token_id", static_cast<uint64_t>(vocabulary.eos_id));
  w.AddUint("tokenizer.ggml.padding_token_id", static_cast<uint64_t>(vocabulary.pad_id));
  w.AddBool("tokenizer.ggml.add_bos_token", true);
  w.AddBool("tokenizer.ggml.add_eos_token", false);
  w.AddString("tokenizer.chat_template", SynthChatTemplate());
  w.AddUint("general.quantization_version", 2);
  w.AddUint("general.file_type", types.file_type());
}

// Which tensors go to which file: in order, a new file where the next tensor would go over `most` bytes.
std::vector<std::vector<size_t>> Split(const SynthPlan& plan, uint64_t most) {
  std::vector<std::vector<size_t>> files(1);
  uint64_t bytes = 0;
  for (size_t i = 0; i < plan.tensors.size(); ++i) {
    const uint64_t next = plan.tensors[i].nbytes();
    if (most > 0 && !files.back().empty() && bytes + next > most) {
      files.emplace_back();
      bytes = 0;
    }
    files.back().push_back(i);
    bytes += next;
  }
  return files;
}

std::vector<std::string> FileNames(const std::string& out, size_t count) {
  if (count == 1) return {out};
  const std::string stem = out.ends_with(".gguf") ? out.substr(0, out.size() - 5) : out;
  std::vector<std::string> names;
  for (size_t i = 0; i < count; ++i) {
    names.push_back(absl::StrFormat("%s-%05d-of-%05d.gguf", stem, i + 1, count));
  }
  return names;
}

absl::Status CheckTarget(const std::vector<std::string>& names, const SynthOptions& options, uint64_t bytes) {
  std::error_code error;
  for (const std::string& name : names) {
    if (!options.force && std::filesystem::exists(name, error)) {
      return absl::AlreadyExistsError(absl::StrCat(name, " exists; --force overwrites it"));
    }
  }
  // The room that counts is that where a link leads.
  std::filesystem::path target = names.front();
  if (std::filesystem::is_symlink(target, error)) target = std::filesystem::weakly_canonical(target, error);
  std::filesystem::path folder = target.parent_path();
  if (folder.empty()) folder = ".";
  struct statvfs disk = {};
  if (statvfs(folder.c_str(), &disk) != 0) {
    return absl::NotFoundError(absl::StrCat(folder.string(), ": ", std::strerror(errno)));
  }
  const uint64_t room = uint64_t{disk.f_bavail} * disk.f_frsize;
  if (room < bytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the model takes ", FormatBytes(bytes), ", ", folder.string(), " has ", FormatBytes(room),
        " left: fewer --moe-layers or --experts make it smaller, --alias-layers lets layers share "
        "their experts' bytes"));
  }
  return absl::OkStatus();
}

// Takes SIGINT and SIGTERM as long as it lives; a second one does what it did before.
class StopSignals {
 public:
  StopSignals() {
    received_ = 0;
    struct sigaction action = {};
    action.sa_handler = [](int number) { received_ = number; };
    action.sa_flags = static_cast<int>(SA_RESETHAND);
    sigaction(SIGINT, &action, &interrupt_);
    sigaction(SIGTERM, &action, &terminate_);
  }
  ~StopSignals() {
    sigaction(SIGINT, &interrupt_, nullptr);
    sigaction(SIGTERM, &terminate_, nullptr);
  }
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;

  static int received() { return received_; }  // its number; 0: none

 private:
  static inline std::atomic<int> received_ = 0;
  struct sigaction interrupt_ = {}, terminate_ = {};
};

}  // namespace

void AddSynthFlags(Command& command, SynthOptions* options) {
  command.Positional("OUT", &options->out, "The file to write")
      .Choice("shape", &options->shape, ShapeNames(), "Whose dimensions")
      .Choice("type", &options->type, TypeScheme::Names(), "Weight types, by the quantization's name")
      .Choice("layout", &options->layout, {"mla", "legacy"},
              "mla: attn_k_b and attn_v_b; legacy: attn_kv_b, as in files of before April 2025")
      .Integer("moe-layers", &options->moe_layers, 0, 1000,
               "Layers with routed experts; default: the shape's")
      .Integer("dense-layers", &options->dense_layers, 0, 1000, "Dense layers; default: the shape's")
      .Integer("experts", &options->experts, 1, 65536, "Routed experts of a layer; default: the shape's")
      .Integer("alias-layers", &options->alias_layers, 0, 1000,
               "So many MoE layers' experts are written, the others share their bytes; 0: each has its own")
      .Integer("seed", &options->seed, 0, INT64_MAX, "The same seed gives the same bytes")
      .Integer("threads", &options->threads, 0, 1024, "Threads that make weights; 0: one a core")
      .Text("split-max-size", &options->split_max_size, "Split into files of at most that: 500M, 40G")
      .Switch("force", &options->force, "Overwrite")
      .NotFromEnvironment("force");
}

absl::StatusOr<SynthPlan> PlanSynth(const SynthOptions& options) {
  TANDEM_ASSIGN_OR_RETURN(model::ModelConfig config, NamedShape(options.shape));
  TANDEM_ASSIGN_OR_RETURN(config, Resize(config, options.dense_layers, options.moe_layers, options.experts));
  TANDEM_ASSIGN_OR_RETURN(const TypeScheme types, TypeScheme::Find(options.type));
  return PlanSynth(config, types, options.layout == "mla", options.alias_layers);
}

absl::StatusOr<std::vector<std::string>> WriteSynth(const SynthPlan& plan, const SynthOptions& options,
                                                    const SynthProgress& progress,
                                                    const std::function<bool()>& cancelled) {
  uint64_t most = 0;
  if (!options.split_max_size.empty()) {
    most = ParseSize(options.split_max_size);
    if (most == 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("--split-max-size ", options.split_max_size, ": a size is 500M or 40G"));
    }
    if (plan.alias_bytes > 0) {
      return absl::InvalidArgumentError(
          "--split-max-size with --alias-layers: tensors of different files cannot share bytes");
    }
  }
  TANDEM_ASSIGN_OR_RETURN(const TypeScheme types, TypeScheme::Find(options.type));
  TANDEM_ASSIGN_OR_RETURN(const SynthVocabulary vocabulary, MakeVocabulary(plan.config.vocab_size));
  const std::vector<std::vector<size_t>> files = Split(plan, most);
  const std::vector<std::string> names = FileNames(options.out, files.size());
  TANDEM_RETURN_IF_ERROR(CheckTarget(names, options, plan.bytes + files.size() * kHeaderBytes));

  threading::ThreadPool::Options pool_options;
  pool_options.threads = static_cast<int>(options.threads);
  threading::ThreadPool pool(pool_options);
  uint64_t done = 0;
  const auto fill = [&](const SynthTensor& tensor, uint64_t offset, std::span<uint8_t> bytes) {
    const uint64_t block = gguf::GetTypeInfo(tensor.type).type_size;
    if (tensor.content == SynthContent::kRandom) {
      const uint64_t seed = TensorSeed(static_cast<uint64_t>(options.seed), tensor.name);
      pool.ParallelFor(static_cast<int64_t>(bytes.size() / block), kFillGrain,
                       [&](int64_t b, int64_t e, int) {
                         const auto begin = static_cast<uint64_t>(b), end = static_cast<uint64_t>(e);
                         FillRandomBlocks(tensor.type, tensor.rms, seed, offset / block + begin,
                                          bytes.subspan(begin * block, (end - begin) * block));
                       });
    } else {
      const float value = tensor.content == SynthContent::kOnes ? 1.0f : 0.0f;
      for (size_t i = 0; i < bytes.size(); i += sizeof value) std::memcpy(&bytes[i], &value, sizeof value);
    }
    done += bytes.size();
    if (progress) progress(done);
  };
  for (size_t f = 0; f < files.size(); ++f) {
    Writer writer;
    if (f == 0) AddMetadata(plan, options, types, vocabulary, writer);
    if (files.size() > 1) {
      writer.AddUint("split.no", f, ValueType::kUint16);
      writer.AddUint("split.count", files.size(), ValueType::kUint16);
      writer.AddInt("split.tensors.count", static_cast<int64_t>(plan.tensors.size()));
    }
    for (const size_t i : files[f]) {
      const SynthTensor& tensor = plan.tensors[i];
      if (tensor.alias_of >= 0) {
        const std::string& original = plan.tensors[static_cast<size_t>(tensor.alias_of)].name;
        TANDEM_RETURN_IF_ERROR(writer.AddAlias(tensor.name, original));
        continue;
      }
      TANDEM_RETURN_IF_ERROR(writer.AddTensor(
          tensor.name, tensor.type, tensor.ne,
          [&fill, &tensor](uint64_t offset, std::span<uint8_t> bytes) { fill(tensor, offset, bytes); }));
    }
    Writer::Options how;
    how.cancelled = cancelled;
    if (const absl::Status written = writer.WriteFile(names[f], how); !written.ok()) {
      // The first files of a split model are of no use without the others.
      for (size_t i = 0; i < f; ++i) std::remove(names[i].c_str());
      return written;
    }
  }
  return names;
}

int RunSynth(const SynthOptions& options, std::ostream& out, std::ostream& err) {
  using Clock = std::chrono::steady_clock;
  const auto failed = [&err](const absl::Status& status) {
    err << "tandem synth: " << std::string(status.message()) << "\n";
    return status.code() == absl::StatusCode::kInvalidArgument ? 2 : 1;
  };
  const absl::StatusOr<SynthPlan> plan = PlanSynth(options);
  if (!plan.ok()) return failed(plan.status());
  const Clock::time_point start = Clock::now();
  const auto seconds = [start] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  double next = 2;
  const auto progress = [&](uint64_t bytes) {
    if (seconds() < next) return;
    next = seconds() + 2;
    const auto share = static_cast<double>(bytes) / static_cast<double>(plan->bytes);
    err << absl::StrFormat("tandem synth: %3.0f %%, %s of %s, %s/s\n", 100 * share, FormatBytes(bytes),
                           FormatBytes(plan->bytes),
                           FormatBytes(static_cast<uint64_t>(static_cast<double>(bytes) / seconds())))
        << std::flush;
  };
  const StopSignals signals;
  const auto names = WriteSynth(*plan, options, progress, [] { return StopSignals::received() != 0; });
  if (absl::IsCancelled(names.status())) {
    err << "tandem synth: stopped, " << options.out << " is not written\n";
    return 128 + StopSignals::received();
  }
  if (!names.ok()) return failed(names.status());
  const model::ModelConfig& c = plan->config;
  out << absl::StrFormat("%s%s: %s %s, %d dense and %d MoE layers of %d experts, %d tensors, %s",
                         names->front(),
                         names->size() > 1 ? absl::StrCat(" and ", names->size() - 1, " more") : "",
                         options.shape, options.type, c.first_k_dense_replace, c.num_moe_layers(),
                         c.n_routed_experts, plan->tensors.size(), FormatBytes(plan->bytes));
  if (plan->alias_bytes > 0) {
    out << absl::StrFormat(" (%s with the bytes that layers share counted each time)",
                           FormatBytes(plan->bytes + plan->alias_bytes));
  }
  out << absl::StrFormat(", %.1f s\n", seconds());
  return 0;
}

}  // namespace tandem::cli
