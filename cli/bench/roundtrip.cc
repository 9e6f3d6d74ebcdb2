// How long an empty call takes from process to process: through the ring in shared memory, and in-band over
// gRPC on a Unix socket with a real expert process.
#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "cli/bench/util.h"
#include "cli/serve/runtime_folder.h"
#include "cli/util/paths.h"
#include "common/base/status_macros.h"
#include "common/rpc/channel.h"
#include "common/shm/round_trip.h"
#include "tandem/v1/experts.grpc.pb.h"

namespace tandem::cli {
namespace {

// An expert process of our own, gone with the object.
class ExpertProcess {
 public:
  static absl::StatusOr<std::unique_ptr<ExpertProcess>> Start(const std::string& program,
                                                              const std::string& model, int64_t threads) {
    if (access(program.c_str(), X_OK) != 0) {
      return absl::NotFoundError(absl::StrCat(program, " is not there or cannot be run"));
    }
    std::unique_ptr<ExpertProcess> process(new ExpertProcess());
    TANDEM_ASSIGN_OR_RETURN(process->folder_, RuntimeFolder::Make());
    process->log_ = process->folder_->path() + "/log";
    std::vector<std::string> args = {program, "--model=" + model, "--listen=" + process->address(),
                                     "--threads=" + std::to_string(threads)};
    std::vector<char*> argv;
    for (std::string& arg : args) argv.push_back(arg.data());
    argv.push_back(nullptr);
    process->child_ = fork();
    if (process->child_ < 0) return absl::InternalError(absl::StrCat("fork fails: ", std::strerror(errno)));
    if (process->child_ == 0) {
      const int log = open(process->log_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
      dup2(log, STDOUT_FILENO);
      dup2(log, STDERR_FILENO);
      execv(program.c_str(), argv.data());
      _exit(127);
    }
    return process;
  }
  ~ExpertProcess() {
    if (child_ <= 0) return;
    kill(child_, SIGTERM);
    waitpid(child_, nullptr, 0);
    std::error_code error;
    std::filesystem::remove(log_, error);
  }
  std::string address() const { return "unix:" + folder_->path() + "/expert.sock"; }
  std::string Log() const {
    std::ifstream in(log_);
    return {std::istreambuf_iterator<char>(in), {}};
  }

 private:
  ExpertProcess() = default;
  std::unique_ptr<RuntimeFolder> folder_;
  std::string log_;
  pid_t child_ = -1;
};

absl::Status MeasureInBand(const BenchOptions& options, const std::string& machine, Report& report) {
  std::string model = options.model;
  if (model.empty()) {
    TANDEM_ASSIGN_OR_RETURN(model, FindDemoModel());
  }
  const std::string program =
      options.expert_program.empty() ? ProgramFolder() + "/tandem-expert" : options.expert_program;
  TANDEM_ASSIGN_OR_RETURN(const std::unique_ptr<ExpertProcess> process,
                          ExpertProcess::Start(program, model, std::max<int64_t>(1, options.threads)));
  TANDEM_ASSIGN_OR_RETURN(const auto channel, rpc::Connect(process->address()));
  const absl::Status serving = rpc::WaitServing(*channel, process->address(), absl::Seconds(60));
  if (!serving.ok()) return Annotate(serving, process->Log());

  const auto stub = v1::Experts::NewStub(channel);
  v1::ShardDescription shard;
  {
    grpc::ClientContext context;
    TANDEM_RETURN_IF_ERROR(rpc::FromGrpc(stub->Describe(&context, v1::DescribeRequest(), &shard)));
  }
  if (shard.layers_size() == 0) return absl::InternalError("the expert process says that it has no layers");
  v1::ForwardRequest request;
  request.set_layer(shard.layers(0));
  request.set_n_tokens(1);
  request.set_experts_per_token(shard.num_experts_per_tok());
  const std::vector<int32_t> none(shard.num_experts_per_tok(), -1);
  request.set_expert_ids(none.data(), none.size() * sizeof(int32_t));
  request.set_expert_weights(std::string(none.size() * sizeof(float), '\0'));
  request.set_activations(std::string(shard.hidden_size() * 2, '\0'));
  request.set_activation_type(v1::DATA_TYPE_BF16);
  request.set_answer_type(v1::DATA_TYPE_F32);
  grpc::ClientContext context;
  const auto stream = stub->Forward(&context);
  v1::ForwardResponse response;
  uint64_t sequence = 0;
  const auto call = [&]() -> absl::Status {
    request.set_sequence(++sequence);
    if (!stream->Write(request) || !stream->Read(&response)) {
      return absl::UnavailableError("the expert process ended the stream");
    }
    if (response.sequence() != sequence || response.status_code() != 0) {
      return absl::InternalError(absl::StrCat("the call is answered with: ", response.status_message()));
    }
    return absl::OkStatus();
  };
  TANDEM_ASSIGN_OR_RETURN(const shm::RoundTrip r,
                          shm::MeasureRoundTrips(options.calls / 10, options.calls, absl::Seconds(10), call));
  stream->WritesDone();
  TANDEM_RETURN_IF_ERROR(rpc::FromGrpc(stream->Finish()));
  Measurement m;
  m.bench = "roundtrip";
  m.machine = machine;
  m.shape = absl::StrCat("in-band, no experts, hidden ", shard.hidden_size());
  m.tokens = 1;
  m.bytes = static_cast<double>(request.activations().size() + response.answer().size());
  m.seconds = r.mean * 1e-6;
  m.p50_us = r.p50;
  m.p99_us = r.p99;
  report.Add(m);
  return absl::OkStatus();
}

absl::Status MeasureRings(const BenchOptions& options, const std::string& machine, Report& report) {
  TANDEM_ASSIGN_OR_RETURN(const std::vector<int> cpus, BenchCpus(2));
  for (const bool spins : {true, false}) {
    for (const uint32_t rows : {0u, 1u}) {
      shm::RingMeasurement how;
      how.calls = options.calls;
      how.warm_up = options.calls / 10;
      how.rows = rows;
      how.wait.spin = spins ? absl::Milliseconds(10) : absl::ZeroDuration();
      how.client_cpu = cpus[0];
      how.host_cpu = cpus.size() > 1 ? cpus[1] : -1;
      TANDEM_ASSIGN_OR_RETURN(const shm::RoundTrip r, shm::MeasureRing(how));
      Measurement m;
      m.bench = "roundtrip";
      m.machine = machine;
      m.shape = absl::StrCat("ring, ", spins ? "spinning" : "sleeping", ", ",
                             rows == 0 ? "empty call" : absl::StrCat("hidden ", how.width));
      m.tokens = rows;
      m.seconds = r.mean * 1e-6;
      m.p50_us = r.p50;
      m.p99_us = r.p99;
      report.Add(m);
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status BenchRoundtrip(const BenchOptions& options, Report& report) {
  const std::string machine = MachineName();
  // The ring's other side is a fork of this process: before gRPC starts its threads.
  TANDEM_RETURN_IF_ERROR(MeasureRings(options, machine, report));
  return MeasureInBand(options, machine, report);
}

}  // namespace tandem::cli
