#include "cli/serve/preflight.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "cli/serve/ports.h"

namespace tandem::cli {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

std::string DemoModel() {
  return std::string(std::getenv("TANDEM_SOURCE_DIR")) + "/models/tinyr1-Q4_K_M.gguf";
}

// Listens at a free port of the loopback until destruction.
class Listener {
 public:
  Listener() : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    if (bind(fd_, reinterpret_cast<sockaddr*>(&address), size) != 0 || listen(fd_, 1) != 0) std::abort();
    getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &size);
    port_ = ntohs(address.sin_port);
  }
  ~Listener() { close(fd_); }
  int port() const { return port_; }

 private:
  int fd_;
  int port_ = 0;
};

TEST(Ports, APortInUseIsNamedWithItsOwner) {
  const Listener listener;
  const absl::Status status = CheckPort("127.0.0.1", listener.port(), "--port");
  EXPECT_EQ(status.code(), absl::StatusCode::kAlreadyExists);
  const std::string message(status.message());
  EXPECT_THAT(message, HasSubstr("port " + std::to_string(listener.port()) + " is in use"));
  EXPECT_THAT(message, HasSubstr("--port"));
  // /proc/net may be hidden; where it is not, the process is this one.
  const std::string owner = PortOwner(listener.port());
  if (!owner.empty()) {
    EXPECT_THAT(message, HasSubstr("(pid " + std::to_string(getpid()) + ")"));
  }
}

TEST(Ports, AHostThatIsWrongIsNamed) {
  for (const char* host : {"nonexistent.invalid", "192.0.2.1"}) {  // no such name, not of this machine
    EXPECT_THAT(std::string(CheckPort(host, 14300, "--port").message()),
                StartsWith("--host: cannot listen at"));
    ServeOptions options;
    options.host = host;
    options.port = 0;
    EXPECT_THAT(std::string(ChoosePorts(options, 1).status().message()), StartsWith("--host: "));
  }
}

TEST(Ports, AFreePortIsFree) {
  const int port = FreePort("127.0.0.1", {}).value();
  EXPECT_TRUE(CheckPort("127.0.0.1", port, "--port").ok());
  EXPECT_NE(FreePort("127.0.0.1", {port}).value(), port);
  EXPECT_EQ(PortOwner(port), "");
}

TEST(Preflight, TheModelOpensWithoutItsWeights) {
  const auto model = OpenModel(DemoModel(), "auto");
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->config.n_routed_experts, 16);
  EXPECT_EQ(model->file->tensors().front().data, nullptr);
}

TEST(Preflight, AMissingModelIsNamed) {
  const auto model = OpenModel("/nonexistent/model.gguf", "auto");
  ASSERT_FALSE(model.ok());
  EXPECT_THAT(std::string(model.status().message()), HasSubstr("/nonexistent/model.gguf"));
  const auto bad_groups = OpenModel(DemoModel(), "3/9");
  EXPECT_EQ(bad_groups.status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(Preflight, ATruncatedModelIsRefused) {
  const std::string path = ::testing::TempDir() + "tandem-truncated.gguf";
  std::filesystem::copy_file(DemoModel(), path, std::filesystem::copy_options::overwrite_existing);
  std::filesystem::permissions(path, std::filesystem::perms::owner_all);
  std::filesystem::resize_file(path, 5'000'000);
  const auto model = OpenModel(path, "auto");
  ASSERT_FALSE(model.ok());
  EXPECT_THAT(std::string(model.status().message()), HasSubstr(path));
  std::filesystem::remove(path);
}

TEST(Preflight, WhichModel) {
  ServeOptions options;
  options.model_path = "/nonexistent/deepseek";
  EXPECT_THAT(std::string(ResolveModelPath(options).status().message()), HasSubstr("--gguf_path"));
  options.model = "given.gguf";
  EXPECT_EQ(*ResolveModelPath(options), "given.gguf");
  const std::string folder = std::string(std::getenv("TANDEM_SOURCE_DIR")) + "/models";
  setenv("TANDEM_MODEL_DIR", folder.c_str(), 1);
  EXPECT_EQ(*ResolveModelPath({}), DemoModel());
  setenv("TANDEM_MODEL_DIR", "/nonexistent", 1);
  EXPECT_THAT(std::string(ResolveModelPath({}).status().message()), HasSubstr("/nonexistent/tinyr1"));
  unsetenv("TANDEM_MODEL_DIR");
}

TEST(Preflight, NoMemoryIsSaidWithTheNumbers) {
  MemoryPlan plan;
  plan.expert_bytes = 380'000'000'000;
  plan.dense_bytes = 10'000'000'000;
  topology::MemoryInfo memory;
  memory.total_bytes = 64'000'000'000;
  memory.available_bytes = 60'000'000'000;
  const absl::Status status = CheckMemory(391'000'000'000, plan, memory);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  for (const char* number : {"391.0 GB", "380.0 GB", "10.0 GB", "60.0 GB", "64.0 GB"}) {
    EXPECT_THAT(std::string(status.message()), HasSubstr(number));
  }
  EXPECT_TRUE(CheckMemory(59'000'000'000, plan, memory).ok());
  memory.cgroup_limit_bytes = 32'000'000'000;
  memory.cgroup_available_bytes = 30'000'000'000;
  EXPECT_THAT(std::string(CheckMemory(59'000'000'000, plan, memory).message()), HasSubstr("32.0 GB"));
}

TEST(Preflight, WhereTheCacheIsTooMuchItsFlagsAreNamed) {
  MemoryPlan plan;
  plan.expert_bytes = 10'000'000'000;
  plan.dense_bytes = 1'000'000'000;
  topology::MemoryInfo memory;
  memory.total_bytes = 64'000'000'000;
  memory.available_bytes = 60'000'000'000;
  const std::string message(CheckMemory(1'011'000'000'000, plan, memory).message());
  for (const char* word : {"KV cache, --kv-host-gb and buffers 1.0 TB", "--kv-tokens"}) {
    EXPECT_THAT(message, HasSubstr(word));
  }
  EXPECT_THAT(message, Not(HasSubstr("smaller model")));
  plan.expert_bytes = 380'000'000'000;
  EXPECT_THAT(std::string(CheckMemory(391'000'000'000, plan, memory).message()), HasSubstr("smaller model"));
}

TEST(Preflight, ServingBytesGrowWithContextAndBatch) {
  const auto model = OpenModel(DemoModel(), "auto");
  ASSERT_TRUE(model.ok());
  const auto plan = PlanMemory(*model->file, model->config, 0, 1).value();
  ServeOptions small;
  small.context = 256;
  small.max_batch_size = 1;
  const uint64_t token = 2 * plan.kv_bytes_per_token;
  ServeOptions large = small;
  large.context = 1256;
  EXPECT_EQ(ServingBytes(large, plan, model->config, 3) - ServingBytes(small, plan, model->config, 3),
            1000 * token);
  large = small;
  large.max_batch_size = 3;
  EXPECT_EQ(ServingBytes(large, plan, model->config, 3) - ServingBytes(small, plan, model->config, 3),
            2 * 256 * token);
  EXPECT_GT(ServingBytes(small, plan, model->config, 3), model->file->file_bytes());
}

TEST(Preflight, TheHostTierIsCountedAndNeverTooMuch) {
  const auto model = OpenModel(DemoModel(), "auto");
  ASSERT_TRUE(model.ok()) << model.status();
  const auto plan = PlanMemory(*model->file, model->config, 0, 1).value();
  topology::MemoryInfo memory;
  memory.total_bytes = 64'000'000'000;
  memory.available_bytes = 20'000'000'000;
  ServeOptions options;
  const uint64_t needed = ServingBytes(options, plan, model->config, 3);
  const uint64_t tier = HostTierBytes(options, needed, memory);
  EXPECT_EQ(tier, (memory.available_bytes - needed) / 4);
  EXPECT_TRUE(CheckMemory(needed + tier, plan, memory).ok());
  EXPECT_EQ(HostTierBytes(options, 30'000'000'000, memory), 0u);
  options.kv_host_gb = 3;
  EXPECT_EQ(ServingBytes(options, plan, model->config, 3), needed + 3'000'000'000);
  EXPECT_EQ(HostTierBytes(options, needed, memory), 0u) << "what is asked for is counted already";
  options.kv_host_gb = -1;
  options.prefix_cache = "off";
  EXPECT_EQ(HostTierBytes(options, needed, memory), 0u);
}

TEST(Preflight, MissingProgramsAreNamed) {
  Process process;
  process.argv = {"/nonexistent/tandem-expert"};
  const absl::Status status = CheckPrograms({process, process});
  EXPECT_EQ(std::string(status.message()),
            "the installation is not complete: /nonexistent/tandem-expert is not there or cannot be run");
  process.argv = {"/bin/sh"};
  EXPECT_TRUE(CheckPrograms({process}).ok());
}

}  // namespace
}  // namespace tandem::cli
