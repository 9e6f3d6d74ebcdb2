#include "common/topology/topology.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mman.h>

#include <numeric>
#include <set>

#include "common/topology/testing.h"

namespace tandem::topology {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Two sockets of four cores with two hardware threads each, one NUMA node a socket.
constexpr char kTwoSockets[] = "pack:2 [numa(memory=64GB)] core:4 pu:2";

Topology Synthetic(const std::string& description, int simulated = 0) {
  auto topology = Topology::Detect({.simulated_nodes = simulated, .synthetic = description});
  EXPECT_TRUE(topology.ok()) << topology.status();
  return *std::move(topology);
}

int TotalThreads(const std::vector<ThreadPlan>& plan) {
  return std::accumulate(plan.begin(), plan.end(), 0,
                         [](int sum, const ThreadPlan& p) { return sum + p.threads; });
}

TEST(Topology, TwoSockets) {
  const Topology t = Synthetic(kTwoSockets);
  EXPECT_EQ(t.sockets(), 2);
  EXPECT_EQ(t.cores(), 8);
  EXPECT_EQ(t.cpus(), 16);
  ASSERT_EQ(t.nodes().size(), 2u);
  EXPECT_FALSE(t.nodes()[0].simulated);
  EXPECT_THAT(t.nodes()[1].os_nodes, ElementsAre(1));
  EXPECT_EQ(t.nodes()[1].cores[0].socket, 1);
  EXPECT_EQ(t.nodes()[0].memory_bytes, 64'000'000'000u);
}

TEST(Topology, PhysicalCoresComeBeforeTheirSiblings) {
  const Topology t = Synthetic(kTwoSockets);
  EXPECT_THAT(t.nodes()[0].CpusInOrder(), ElementsAre(0, 2, 4, 6, 1, 3, 5, 7));
  EXPECT_THAT(t.nodes()[1].CpusInOrder(), ElementsAre(8, 10, 12, 14, 9, 11, 13, 15));
}

TEST(Topology, PlanWithoutANumberUsesThePhysicalCores) {
  const auto plan = Synthetic(kTwoSockets).PlanThreads(0);
  ASSERT_TRUE(plan.ok()) << plan.status();
  ASSERT_EQ(plan->size(), 2u);
  EXPECT_THAT((*plan)[0].cpus, ElementsAre(0, 2, 4, 6));
  EXPECT_THAT((*plan)[1].cpus, ElementsAre(8, 10, 12, 14));
}

TEST(Topology, PlanSharesATotalOutEvenly) {
  const Topology t = Synthetic(kTwoSockets);
  const auto five = t.PlanThreads(5).value();
  EXPECT_EQ(five[0].threads, 3);
  EXPECT_EQ(five[1].threads, 2);
  const auto ten = t.PlanThreads(10).value();
  EXPECT_THAT(ten[0].cpus, ElementsAre(0, 2, 4, 6, 1));
  EXPECT_THAT(ten[1].cpus, ElementsAre(8, 10, 12, 14, 9));
  const auto many =
      t.PlanThreads(40).value();  // more threads than there are CPUs: CPUs are not repeated in the list
  EXPECT_EQ(TotalThreads(many), 40);
  EXPECT_EQ(many[0].cpus.size(), 8u);
}

TEST(Topology, PlanForSomeNodes) {
  const auto plan = Synthetic(kTwoSockets).PlanThreads(3, 1).value();
  ASSERT_EQ(plan.size(), 1u);
  EXPECT_THAT(plan[0].cpus, ElementsAre(0, 2, 4));
}

TEST(Topology, EveryNodeGetsAThread) {
  const auto plan = Synthetic(kTwoSockets).PlanThreads(1).value();
  EXPECT_EQ(plan[0].threads, 1);
  EXPECT_EQ(plan[1].threads, 1);
}

TEST(Topology, UnevenNodesFillTheirCoresFirst) {
  const Topology t = Synthetic("pack:2 [numa] core:2 pu:2", 3);  // four cores on three nodes: 2, 1, 1
  EXPECT_EQ(t.nodes()[0].cores.size(), 2u);
  const auto plan = t.PlanThreads(4).value();
  EXPECT_EQ(plan[0].threads, 2);
  EXPECT_EQ(plan[1].threads, 1);
  EXPECT_EQ(plan[2].threads, 1);
}

TEST(Topology, PlanRefusesNonsense) {
  const Topology t = Synthetic(kTwoSockets);
  EXPECT_EQ(t.PlanThreads(-1).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(t.PlanThreads(4, 3).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(t.PlanThreads(4, 3).status().message()), HasSubstr("there are 2"));
}

TEST(Topology, SimulatedNodesSplitOneNode) {
  const Topology t = Synthetic("pack:1 [numa(memory=64GB)] core:4 pu:2", 2);
  ASSERT_EQ(t.nodes().size(), 2u);
  EXPECT_TRUE(t.nodes()[0].simulated);
  EXPECT_THAT(t.nodes()[0].CpusInOrder(), ElementsAre(0, 2, 1, 3));
  EXPECT_THAT(t.nodes()[1].CpusInOrder(), ElementsAre(4, 6, 5, 7));
  EXPECT_THAT(t.nodes()[1].os_nodes, ElementsAre(0));
  EXPECT_EQ(t.nodes()[1].memory_bytes, 32'000'000'000u);
  EXPECT_EQ(t.cores(), 4);
}

TEST(Topology, MoreSimulatedNodesThanCoresShareThem) {
  const Topology t = Synthetic("pack:1 [numa] core:2 pu:1", 4);
  ASSERT_EQ(t.nodes().size(), 4u);
  EXPECT_THAT(t.nodes()[0].CpusInOrder(), ElementsAre(0));
  EXPECT_THAT(t.nodes()[1].CpusInOrder(), ElementsAre(1));
  EXPECT_THAT(t.nodes()[2].CpusInOrder(), ElementsAre(0));
  EXPECT_EQ(TotalThreads(t.PlanThreads(0).value()), 4);
  EXPECT_EQ(t.cores(), 2);
}

TEST(Topology, OneSimulatedNodeJoinsTwoReal) {
  const Topology t = Synthetic(kTwoSockets, 1);
  ASSERT_EQ(t.nodes().size(), 1u);
  EXPECT_THAT(t.nodes()[0].os_nodes, ElementsAre(0, 1));
  EXPECT_EQ(t.nodes()[0].cores.size(), 8u);
  EXPECT_EQ(t.nodes()[0].memory_bytes, 128'000'000'000u);
}

TEST(Topology, AsManySimulatedAsRealAreTheReal) {
  const Topology t = Synthetic(kTwoSockets, 2);
  EXPECT_FALSE(t.nodes()[0].simulated);
}

TEST(Topology, RefusesBadOptions) {
  EXPECT_EQ(Topology::Detect({.simulated_nodes = -1}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Topology::Detect({.simulated_nodes = 65}).status().code(), absl::StatusCode::kInvalidArgument);
  const auto bad = Topology::Detect({.synthetic = "no such thing"});
  ASSERT_FALSE(bad.ok());
  EXPECT_THAT(std::string(bad.status().message()), HasSubstr("no such thing"));
}

TEST(Topology, ThisMachineMatchesItsAffinityMask) {
  const auto t = Topology::Detect();
  ASSERT_TRUE(t.ok()) << t.status();
  cpu_set_t mask;
  CPU_ZERO(&mask);
  ASSERT_EQ(sched_getaffinity(0, sizeof mask, &mask), 0);
  std::set<int> cpus;
  for (const Node& node : t->nodes()) {
    for (const int cpu : node.CpusInOrder()) {
      EXPECT_TRUE(CPU_ISSET(cpu, &mask)) << cpu;
      EXPECT_TRUE(cpus.insert(cpu).second) << cpu << " stands in two nodes";
    }
  }
  EXPECT_EQ(static_cast<int>(cpus.size()), CPU_COUNT(&mask));
  EXPECT_EQ(t->cpus(), CPU_COUNT(&mask));
  EXPECT_FALSE(t->cpu_flags().empty());
}

TEST(Topology, AffinityMaskIsRespected) {
  cpu_set_t before;
  CPU_ZERO(&before);
  ASSERT_EQ(sched_getaffinity(0, sizeof before, &before), 0);
  int first = 0;
  while (!CPU_ISSET(first, &before)) ++first;
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(first, &one);
  ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
  const auto t = Topology::Detect();
  ASSERT_EQ(sched_setaffinity(0, sizeof before, &before), 0);
  ASSERT_TRUE(t.ok()) << t.status();
  ASSERT_EQ(t->nodes().size(), 1u);
  EXPECT_THAT(t->nodes()[0].CpusInOrder(), ElementsAre(first));
}

TEST(Topology, CpuQuotaBoundsTheDefault) {
  FakeRoot root;
  root.Write("/proc/self/cgroup", "0::/\n");
  root.Write("/sys/fs/cgroup/cpu.max", "100000 100000\n");
  root.Write("/proc/cpuinfo",
             "processor : 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: sse avx2 amx_int8\n");
  const auto t = Topology::Detect({.root = root.path()});
  ASSERT_TRUE(t.ok()) << t.status();
  EXPECT_DOUBLE_EQ(t->cpu_quota(), 1.0);
  EXPECT_EQ(TotalThreads(t->PlanThreads(0, 1).value()), 1);
  EXPECT_EQ(t->cpu_model(), "Some CPU @ 2 GHz");
  EXPECT_TRUE(t->HasFlag("avx2"));
  EXPECT_FALSE(t->HasFlag("avx"));
}

TEST(Topology, BindMemoryKeepsTheMemoryUsable) {
  const auto t = Topology::Detect();
  ASSERT_TRUE(t.ok());
  const size_t bytes = 1 << 20;
  void* area = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(area, MAP_FAILED);
  const absl::Status bound = t->BindMemory(area, bytes, 0);
  // Where the kernel forbids it (containers), that is what it says.
  EXPECT_TRUE(bound.ok() || bound.code() == absl::StatusCode::kPermissionDenied ||
              bound.code() == absl::StatusCode::kUnimplemented)
      << bound;
  static_cast<char*>(area)[bytes - 1] = 1;
  EXPECT_EQ(t->BindMemory(area, bytes, 99).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(t->BindMemory(area, bytes, -1).code(), absl::StatusCode::kInvalidArgument);
  munmap(area, bytes);
}

TEST(Topology, MemoryOfASyntheticMachineCannotBeBound) {
  char byte = 0;
  EXPECT_EQ(Synthetic(kTwoSockets).BindMemory(&byte, 1, 0).code(), absl::StatusCode::kUnimplemented);
}

}  // namespace
}  // namespace tandem::topology
