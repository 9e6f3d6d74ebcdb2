#include "cli/serve/launch_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "cli/serve/memory_plan.h"

namespace tandem::cli {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsSupersetOf;
using ::testing::Not;
using ::testing::StartsWith;

model::ModelConfig Config(int64_t inner, int64_t experts) {
  model::ModelConfig config;
  config.moe_intermediate_size = inner;
  config.n_routed_experts = experts;
  config.num_experts_per_tok = 8;
  return config;
}

topology::Topology TwoSockets(int simulated = 0) {
  return *topology::Topology::Detect(
      {.simulated_nodes = simulated, .synthetic = "pack:2 [numa] core:4 pu:2"});
}

TEST(ShareExperts, SlicesWhereTheBlocksAllowIt) {
  for (const int n : {2, 4, 8}) {
    const auto shards = ShareExperts(Config(2048, 256), n);
    ASSERT_EQ(static_cast<int>(shards.size()), n);
    for (const ExpertShard& shard : shards) {
      EXPECT_TRUE(shard.sliced);
      EXPECT_EQ(shard.first_expert, 0);
      EXPECT_EQ(shard.last_expert, 255);
    }
  }
  EXPECT_FALSE(ShareExperts(Config(2048, 256), 1)[0].sliced);
}

TEST(ShareExperts, RangesCoverAllExpertsOnce) {
  for (const int n : {1, 2, 3, 5, 16}) {
    const auto shards = ShareExperts(Config(1408, 64), n);  // V2-Lite: 1408 has no slices of 256 rows
    int64_t next = 0;
    for (const ExpertShard& shard : shards) {
      EXPECT_FALSE(shard.sliced);
      EXPECT_EQ(shard.first_expert, next);
      EXPECT_GE(shard.last_expert, shard.first_expert);
      next = shard.last_expert + 1;
    }
    EXPECT_EQ(next, 64);
  }
}

TEST(ChoosePorts, TheDocumentedDefaults) {
  const Ports ports = ChoosePorts({}, 2).value();
  EXPECT_EQ(ports.http, 10002);
  EXPECT_EQ(ports.grpc, 10003);
  EXPECT_EQ(ports.attention_metrics, 10011);
  EXPECT_THAT(ports.expert_metrics, ::testing::ElementsAre(10021, 10023));
}

TEST(ChoosePorts, FollowTheHttpPort) {
  ServeOptions options;
  options.port = 20002;
  const Ports ports = ChoosePorts(options, 1).value();
  EXPECT_EQ(ports.attention_metrics, 20011);
  EXPECT_THAT(ports.expert_metrics, ::testing::ElementsAre(20021));
  options.metrics_base_port = 30000;
  EXPECT_EQ(ChoosePorts(options, 1)->attention_metrics, 30000);
}

TEST(ChoosePorts, ZeroTakesFreeOnes) {
  ServeOptions options;
  options.port = options.grpc_port = 0;
  const Ports ports = ChoosePorts(options, 3).value();
  std::set<int> all(ports.expert_metrics.begin(), ports.expert_metrics.end());
  all.insert({ports.http, ports.grpc, ports.attention_metrics});
  EXPECT_EQ(all.size(), 6u);
  EXPECT_GT(*all.begin(), 0);
}

TEST(ChoosePorts, RefusesTheSamePortTwice) {
  ServeOptions options;
  options.grpc_port = 10002;
  const auto ports = ChoosePorts(options, 1);
  EXPECT_EQ(ports.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(ports.status().message()), HasSubstr("10002"));
}

TEST(PlanProcesses, TheEnginesFlagsArePassedOnWhereGiven) {
  ServeOptions options;
  const auto attention = [&] {
    const auto plan = PlanProcesses(options, "/m.gguf", Config(2048, 256), TwoSockets(),
                                    ChoosePorts(options, 2).value(), "/run/t", "/opt/bin");
    return plan.value()[2].argv;
  };
  EXPECT_THAT(attention(), Not(Contains(HasSubstr("--kv-host-gb"))));
  EXPECT_THAT(attention(), Not(Contains(HasSubstr("--max-decode-slowdown"))));
  options.kv_host_gb = 0;
  EXPECT_THAT(attention(), Contains("--kv-host-gb=0")) << "none is not the default";
  options.kv_tokens = 70000;
  options.kv_host_gb = 2.5;
  options.max_waiting = 9;
  options.prefix_cache = "off";
  options.max_decode_slowdown = 0;
  options.vram_gb = 20;
  EXPECT_THAT(attention(), IsSupersetOf({"--kv-tokens=70000", "--kv-host-gb=2.5", "--max-waiting=9",
                                         "--prefix-cache=off", "--max-decode-slowdown=0", "--vram-gb=20"}));
}

TEST(PlanProcesses, StreamingAndItsMemoryArePassedOnWhereGiven) {
  ServeOptions options;
  auto plan = [&] {
    return PlanProcesses(options, "/m.gguf", Config(2048, 256), TwoSockets(), ChoosePorts(options, 2).value(),
                         "/run/t", "/opt/bin")
        .value();
  };
  for (const Process& p : plan()) {
    EXPECT_THAT(p.argv, Not(Contains(HasSubstr("--stream-prefill"))));
    EXPECT_THAT(p.argv, Not(Contains(HasSubstr("--stream-share"))));
    EXPECT_THAT(p.argv, Not(Contains(HasSubstr("--stream-chunk-size"))));
    EXPECT_THAT(p.argv, Not(Contains(HasSubstr("--arena"))));
  }
  EXPECT_THAT(plan()[2].argv, Not(Contains(HasSubstr("--kv-cache-type"))));
  options.kv_cache_type = "int8";
  EXPECT_THAT(plan()[2].argv, Contains("--kv-cache-type=int8"));
  EXPECT_THAT(plan()[2].argv, Not(Contains(HasSubstr("--defer-experts"))));
  options.defer_experts = 2;
  EXPECT_THAT(plan()[2].argv, Contains("--defer-experts=2"));
  options.stream_prefill = "700";
  options.stream_share = "40";
  options.stream_chunk_size = 0;
  options.arena = "shared";
  EXPECT_THAT(plan()[0].argv, Contains("--arena=shared"));
  EXPECT_THAT(plan()[1].argv, Contains("--arena=shared"));
  EXPECT_THAT(plan()[2].argv, Contains("--stream-prefill=700"));
  EXPECT_THAT(plan()[2].argv, Contains("--stream-share=40"));
  EXPECT_THAT(plan()[2].argv, Contains("--stream-chunk-size=0"));
}

TEST(PlanProcesses, OneExpertProcessASocket) {
  ServeOptions options;
  options.cpu_infer = 6;
  options.context = 4096;
  const auto plan = PlanProcesses(options, "/m.gguf", Config(2048, 256), TwoSockets(),
                                  ChoosePorts(options, 2).value(), "/run/t", "/opt/bin");
  ASSERT_TRUE(plan.ok()) << plan.status();
  ASSERT_EQ(plan->size(), 4u);
  const Process& first = (*plan)[0];
  EXPECT_EQ(first.name, "expert0");
  EXPECT_EQ(first.argv[0], "/opt/bin/tandem-expert");
  EXPECT_THAT(first.argv, Contains("--model=/m.gguf"));
  EXPECT_THAT(first.argv, Contains("--listen=unix:/run/t/expert0.sock"));
  EXPECT_THAT(first.argv, Contains("--slice=0/2"));
  EXPECT_THAT(first.argv, Contains("--threads=3"));
  EXPECT_THAT(first.argv, Contains("--cpus=0,2,4"));
  EXPECT_THAT(first.argv, Contains("--numa-node=0"));
  EXPECT_THAT(first.argv, Not(Contains(StartsWith("--numa-nodes"))));
  EXPECT_THAT((*plan)[1].argv, Contains("--slice=1/2"));
  EXPECT_THAT((*plan)[1].argv, Contains("--cpus=8,10,12"));
  const Process& attention = (*plan)[2];
  EXPECT_THAT(attention.argv, Contains("--expert=unix:/run/t/expert0.sock"));
  EXPECT_THAT(attention.argv, Contains("--expert=unix:/run/t/expert1.sock"));
  EXPECT_THAT(attention.argv, Contains("--ctx=4096"));
  EXPECT_THAT(attention.argv, Contains("--threads=6"));
  EXPECT_THAT(attention.argv, Contains("--cpus=0,2,4,8,10,12"));
  const Process& gateway = (*plan)[3];
  EXPECT_THAT(gateway.argv, Contains("--engine=unix:/run/t/attention.sock"));
  EXPECT_THAT(gateway.argv, Contains("--listen=127.0.0.1:10002"));
  EXPECT_LT(gateway.stop_order, attention.stop_order);
  EXPECT_LT(attention.stop_order, first.stop_order);
}

TEST(PlanProcesses, ExpertRangesEndBeforeTheirSecondNumber) {
  const ServeOptions options;
  const auto plan = PlanProcesses(options, "m", Config(256, 16), TwoSockets(2),
                                  ChoosePorts(options, 2).value(), "/r", "/b");
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT((*plan)[0].argv, Contains("--experts=0-8"));
  EXPECT_THAT((*plan)[1].argv, Contains("--experts=8-16"));
}

TEST(PlanProcesses, OneProcessHoldsEverything) {
  const ServeOptions options;
  const auto plan = PlanProcesses(options, "m", Config(2048, 256), TwoSockets(1),
                                  ChoosePorts(options, 1).value(), "/r", "/b");
  ASSERT_TRUE(plan.ok()) << plan.status();
  ASSERT_EQ(plan->size(), 3u);
  for (const std::string& word : (*plan)[0].argv) {
    EXPECT_THAT(word, Not(StartsWith("--slice")));
    EXPECT_THAT(word, Not(StartsWith("--experts")));
  }
}

TEST(PlanProcesses, TheMemoryCheckIsLeftOutEverywhere) {
  ServeOptions options;
  options.memory_check = false;
  const auto plan = PlanProcesses(options, "m", Config(2048, 256), TwoSockets(1),
                                  ChoosePorts(options, 1).value(), "/r", "/b");
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT((*plan)[0].argv, Contains("--memory-check=false"));
  EXPECT_THAT((*plan)[1].argv, Contains("--memory-check=false"));
}

TEST(PlanProcesses, AWildcardHostIsAskedAtTheLoopback) {
  ServeOptions options;
  options.host = "0.0.0.0";
  const auto plan = PlanProcesses(options, "m", Config(2048, 256), TwoSockets(1),
                                  ChoosePorts(options, 1).value(), "/r", "/b");
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->back().health, "http://127.0.0.1:10002/ready");
  EXPECT_THAT(plan->back().argv, Contains("--listen=0.0.0.0:10002"));
}

TEST(PlanProcesses, MoreDeferredExpertsThanATokenHasAreRefused) {
  ServeOptions options;
  options.defer_experts = 8;
  for (const int64_t experts : {256, 0}) {
    const auto plan = PlanProcesses(options, "m", Config(2048, experts), TwoSockets(1),
                                    ChoosePorts(options, 1).value(), "/r", "/b");
    EXPECT_EQ(plan.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(plan.status().message()), StartsWith("--defer-experts 8: "));
  }
}

TEST(PlanProcesses, MetricsOfAnIpv6HostListenAtIpv4) {
  for (const auto& [host, metrics] : std::vector<std::pair<std::string, std::string>>{
           {"::1", "127.0.0.1"}, {"fe80::1", "127.0.0.1"}, {"::", "0.0.0.0"}, {"0.0.0.0", "0.0.0.0"}}) {
    ServeOptions options;
    options.host = host;
    const auto plan = PlanProcesses(options, "m", Config(2048, 256), TwoSockets(1),
                                    ChoosePorts(options, 1).value(), "/r", "/b");
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_THAT((*plan)[0].argv, Contains("--metrics-listen=" + metrics + ":10021"));
    EXPECT_THAT((*plan)[1].argv, Contains("--metrics-listen=" + metrics + ":10011"));
  }
}

}  // namespace
}  // namespace tandem::cli
