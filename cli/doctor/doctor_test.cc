#include "cli/doctor/doctor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <sstream>

namespace tandem::cli {
namespace {

using ::testing::HasSubstr;

class DoctorTest : public ::testing::Test {
 protected:
  DoctorTest()
      : topology_(*topology::Topology::Detect({.synthetic = "pack:2 [numa(memory=256GB)] core:4 pu:2"})) {
    machine_.topology = &topology_;
    machine_.memory.total_bytes = uint64_t{512} << 30;
    machine_.memory.available_bytes = uint64_t{500} << 30;
    machine_.huge_pages.thp = "madvise";
    machine_.huge_pages.shmem = "advise";
    machine_.gpus.note = "no NVIDIA driver";
    machine_.open_files.soft = 65536;
    machine_.swappiness = 60;
    machine_.isa = "avx2";
  }

  // The finding about `topic` that is not OK, if there is one.
  std::optional<Finding> Complaint(const std::string& topic) {
    for (const Finding& finding : Examine(machine_)) {
      if (finding.topic == topic && finding.level != Finding::Level::kOk) return finding;
    }
    return std::nullopt;
  }

  topology::Topology topology_;
  Machine machine_;
};

TEST_F(DoctorTest, AGoodMachineHasNothingToChange) {
  for (const Finding& finding : Examine(machine_)) {
    EXPECT_EQ(finding.level, Finding::Level::kOk) << finding.topic << ": " << finding.text;
    EXPECT_EQ(finding.advice, "");
  }
}

TEST_F(DoctorTest, EveryComplaintHasItsCommand) {
  machine_.huge_pages.thp = "never";
  machine_.huge_pages.shmem = "never";
  machine_.memlock.soft = 8 << 20;
  machine_.open_files.soft = 256;
  machine_.swap_bytes = uint64_t{8} << 30;
  machine_.isa = "scalar";
  EXPECT_THAT(Complaint("huge pages")->advice,
              HasSubstr("echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"));
  EXPECT_THAT(Complaint("shared memory")->text, HasSubstr("--arena shared"));
  EXPECT_THAT(Complaint("shared memory")->advice, HasSubstr("shmem_enabled"));
  EXPECT_THAT(Complaint("memlock")->advice, HasSubstr("ulimit -l unlimited"));
  EXPECT_THAT(Complaint("open files")->advice, HasSubstr("ulimit -n"));
  EXPECT_THAT(Complaint("swapping")->advice, HasSubstr("vm.swappiness=1"));
  EXPECT_TRUE(Complaint("instructions").has_value());
}

TEST_F(DoctorTest, ReservedHugePagesAreEnough) {
  machine_.huge_pages.thp = "never";
  machine_.huge_pages.shmem = "never";
  machine_.expert_bytes = uint64_t{4} << 30;
  machine_.huge_pages.pools = {{.os_node = 0, .page_bytes = 2 << 20, .total = 1000, .free = 1000},
                               {.os_node = 1, .page_bytes = uint64_t{1} << 30, .total = 4, .free = 4}};
  EXPECT_FALSE(Complaint("huge pages").has_value());
  EXPECT_FALSE(Complaint("shared memory").has_value());
  machine_.huge_pages.pools[1].free = 1;
  EXPECT_TRUE(Complaint("huge pages").has_value());
}

TEST_F(DoctorTest, AGpuIsDescribed) {
  machine_.gpus.note.clear();
  machine_.gpus.driver = "CUDA 12.8";
  machine_.gpus.gpus = {{.index = 0,
                         .name = "NVIDIA GeForce RTX 4090",
                         .memory_bytes = 25'757'220'864,
                         .compute_major = 8,
                         .compute_minor = 9,
                         .pci = "0000:41:00.0",
                         .pcie_speed = "16.0 GT/s PCIe",
                         .pcie_width = 16,
                         .os_numa_node = 0}};
  std::string text;
  for (const Finding& finding : Examine(machine_)) {
    if (finding.topic == "GPU") text += finding.text;
  }
  EXPECT_EQ(text,
            "0: NVIDIA GeForce RTX 4090, 25.8 GB, compute capability 8.9, 16.0 GT/s PCIe x16, NUMA node 0, "
            "CUDA 12.8");
}

TEST(Doctor, RunsOnThisMachine) {
  std::ostringstream out;
  EXPECT_EQ(RunDoctor({}, out), 0) << out.str();
  for (const char* topic :
       {"processor", "NUMA node", "memory", "instructions", "huge pages", "memlock", "GPU"}) {
    EXPECT_THAT(out.str(), HasSubstr(topic));
  }
}

TEST(Doctor, TellsWhetherAModelFits) {
  const std::string model = std::string(std::getenv("TANDEM_SOURCE_DIR")) + "/models/tinyr1-Q4_K_M.gguf";
  std::ostringstream out;
  EXPECT_EQ(RunDoctor({.model = model}, out), 0) << out.str();
  EXPECT_THAT(out.str(), HasSubstr("it fits"));
}

TEST(Doctor, AModelThatCannotBeOpenedIsWrong) {
  std::ostringstream out;
  EXPECT_EQ(RunDoctor({.model = "/nonexistent.gguf"}, out), 1);
  EXPECT_THAT(out.str(), HasSubstr("WRONG"));
  EXPECT_THAT(out.str(), HasSubstr("/nonexistent.gguf"));
}

}  // namespace
}  // namespace tandem::cli
