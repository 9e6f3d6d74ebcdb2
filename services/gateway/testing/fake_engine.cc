#include "services/gateway/testing/fake_engine.h"

#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <thread>

#include "common/base/check.h"
#include "common/gguf/gguf.h"

namespace tandem::gateway::testing {
namespace {

constexpr size_t kChunk = 100'000;  // several chunks, none on a border of anything

}  // namespace

std::string DemoModelPath() {
  const char* root = std::getenv("TANDEM_SOURCE_DIR");
  return std::string(root == nullptr ? "." : root) + "/models/tinyr1-Q4_K_M.gguf";
}

FakeEngine::FakeEngine() {
  gguf::File::Options options;
  options.map_data = false;
  auto file = gguf::File::Open(DemoModelPath(), options);
  if (!file.ok()) {
    std::fprintf(stderr, "%s\n", file.status().ToString().c_str());
    std::abort();
  }
  gguf::Writer writer;
  for (const auto& [key, value] : (*file)->metadata()) writer.AddValue(key, value);
  metadata_ = writer.SerializeMetadata();
  auto tokenizer = tokenizer::Tokenizer::FromGguf(**file);
  TANDEM_CHECK(tokenizer.ok());
  tokenizer_ = std::move(*tokenizer);
  static std::atomic<int> count{0};
  const char* folder = std::getenv("TMPDIR");
  address_ = "unix:" + std::string(folder == nullptr ? "/tmp" : folder) + "/tandem-fake-engine-" +
             std::to_string(getpid()) + "-" + std::to_string(count.fetch_add(1)) + ".sock";
}

FakeEngine::~FakeEngine() { Stop(); }

void FakeEngine::Start() {
  instance_.fetch_add(1);
  rpc::ServerOptions options;
  options.listen = {address_};
  auto server = rpc::Server::Start(options, {this});
  if (!server.ok()) {
    std::fprintf(stderr, "%s\n", server.status().ToString().c_str());
    std::abort();
  }
  server_ = std::move(*server);
  server_->SetServing(true);
}

void FakeEngine::Stop() {
  if (server_ == nullptr) return;
  server_->Shutdown(absl::ZeroDuration());
  server_.reset();
}

void FakeEngine::SetScript(Script script) {
  std::lock_guard lock(mutex_);
  script_ = std::move(script);
}

void FakeEngine::SetDegraded(const std::string& why) {
  std::lock_guard lock(mutex_);
  degraded_ = why;
}

std::vector<v1::GenerateRequest> FakeEngine::requests() const {
  std::lock_guard lock(mutex_);
  return requests_;
}

bool FakeEngine::WaitCancelled(int count) const {
  for (int i = 0; i < 30000 && cancelled() < count; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  return cancelled() >= count;
}

grpc::Status FakeEngine::Describe(grpc::ServerContext*, const v1::DescribeEngineRequest*,
                                  v1::EngineDescription* out) {
  if (!serving_.load()) return {grpc::StatusCode::UNAVAILABLE, "loading the model: 42 %"};
  out->set_model_name("TinyR1");
  out->set_model_fingerprint("0123456789abcdef");
  out->set_architecture("deepseek2");
  out->set_vocab_size(static_cast<uint32_t>(tokenizer_->vocab_size()));
  out->set_context_length(context_.load());
  out->set_max_batch_size(8);
  out->set_backend("cpu");
  out->set_instance_id(std::to_string(instance_.load()));
  std::lock_guard lock(mutex_);
  out->set_degraded(degraded_);
  return grpc::Status::OK;
}

grpc::Status FakeEngine::ReadMetadata(grpc::ServerContext*, const v1::ReadMetadataRequest*,
                                      grpc::ServerWriter<v1::MetadataChunk>* writer) {
  for (size_t at = 0; at < metadata_.size(); at += kChunk) {
    v1::MetadataChunk chunk;
    chunk.set_data(metadata_.substr(at, kChunk));
    writer->Write(chunk);
  }
  return grpc::Status::OK;
}

grpc::Status FakeEngine::Generate(grpc::ServerContext* context, const v1::GenerateRequest* request,
                                  grpc::ServerWriter<v1::GenerateEvent>* writer) {
  struct Counted {
    explicit Counted(std::atomic<int>& n) : n(n) { n.fetch_add(1); }
    ~Counted() { n.fetch_sub(1); }
    std::atomic<int>& n;
  } counted(running_);
  Script script;
  {
    std::lock_guard lock(mutex_);
    requests_.push_back(*request);
    script = script_;
  }
  std::vector<int32_t> tokens = tokenizer_->Encode(script.text);
  tokens.push_back(tokenizer_->eos_id());
  const auto is_stop = [request](int32_t token) {
    return std::find(request->stop_token_ids().begin(), request->stop_token_ids().end(), token) !=
           request->stop_token_ids().end();
  };
  const auto gone = [&] {
    if (!context->IsCancelled()) return false;
    cancelled_.fetch_add(1);
    return true;
  };
  const auto wait_until_gone = [&] {
    while (!gone()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return grpc::Status::CANCELLED;
  };
  if (script.hang) return wait_until_gone();
  uint32_t made = 0;
  v1::GenerateEvent event;
  for (size_t at = request->resumed_tokens(); at < tokens.size(); ++at) {
    if (script.delay.count() > 0) std::this_thread::sleep_for(script.delay);
    if (gone()) return grpc::Status::CANCELLED;
    if (script.fail_after.has_value() && static_cast<int>(made) >= *script.fail_after) return script.failure;
    v1::GeneratedToken& token = *event.add_tokens();
    token.set_token(tokens[at]);
    if (request->logprobs()) {
      token.set_logprob(-0.25f);
      for (uint32_t k = 0; k < request->top_logprobs(); ++k) {
        v1::TokenLogprob& top = *token.add_top_logprobs();
        top.set_token(k == 0 ? tokens[at] : static_cast<int32_t>(100 + k));
        top.set_logprob(-0.25f - static_cast<float>(k));
      }
    }
    ++made;
    if (is_stop(tokens[at])) {
      event.set_finish_reason(v1::FINISH_REASON_STOP);
    } else if (made == request->max_new_tokens()) {
      event.set_finish_reason(v1::FINISH_REASON_LENGTH);
    }
    const bool last = event.finish_reason() != v1::FINISH_REASON_UNSPECIFIED;
    if (last) {
      v1::GenerateStatistics& statistics = *event.mutable_statistics();
      statistics.set_prompt_tokens(static_cast<uint32_t>(request->prompt_tokens_size()));
      statistics.set_cached_prompt_tokens(3);
      statistics.set_generated_tokens(made);
      statistics.set_queue_seconds(0.001);
      statistics.set_prefill_seconds(0.5);
      statistics.set_decode_seconds(0.25);
    }
    if (last && !script.finish) return grpc::Status::OK;
    if (last || event.tokens_size() >= script.tokens_per_event) {
      if (!writer->Write(event)) {
        cancelled_.fetch_add(1);
        return grpc::Status::CANCELLED;
      }
      event.Clear();
    }
    if (last) return grpc::Status::OK;
  }
  if (script.stay) return wait_until_gone();
  return grpc::Status::OK;
}

}  // namespace tandem::gateway::testing
