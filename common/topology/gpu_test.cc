#include "common/topology/gpu.h"

#include <gtest/gtest.h>

#include "common/topology/testing.h"

namespace tandem::topology {
namespace {

TEST(Gpu, ReadsWhatTheKernelDriverSays) {
  FakeRoot root;
  root.Write("/proc/driver/nvidia/gpus/0000:c1:00.0/information", "Model: \t\t NVIDIA H100\nIRQ: 7\n");
  root.Write("/proc/driver/nvidia/gpus/0000:41:00.0/information",
             "Model: \t\t NVIDIA GeForce RTX 4090\nIRQ:   \t\t 188\nBus Location: \t 0000:41:00.0\n");
  root.Write("/sys/bus/pci/devices/0000:41:00.0/max_link_speed", "16.0 GT/s PCIe\n");
  root.Write("/sys/bus/pci/devices/0000:41:00.0/max_link_width", "16\n");
  root.Write("/sys/bus/pci/devices/0000:41:00.0/numa_node", "1\n");
  const std::vector<Gpu> gpus = ReadProcGpus(root.path());
  ASSERT_EQ(gpus.size(), 2u);
  EXPECT_EQ(gpus[0].name, "NVIDIA GeForce RTX 4090");
  EXPECT_EQ(gpus[0].pci, "0000:41:00.0");
  EXPECT_EQ(gpus[0].pcie_speed, "16.0 GT/s PCIe");
  EXPECT_EQ(gpus[0].pcie_width, 16);
  EXPECT_EQ(gpus[0].os_numa_node, 1);
  EXPECT_EQ(gpus[1].index, 1);
  EXPECT_EQ(gpus[1].name, "NVIDIA H100");
  EXPECT_EQ(gpus[1].pcie_width, 0);
  EXPECT_EQ(gpus[1].os_numa_node, -1);
}

TEST(Gpu, NoneWithoutADriver) {
  FakeRoot root;
  EXPECT_TRUE(ReadProcGpus(root.path()).empty());
}

TEST(Gpu, AReportWithoutGpusSaysWhy) {
  const GpuReport report = DetectGpus();
  for (const Gpu& gpu : report.gpus) EXPECT_FALSE(gpu.name.empty());
  EXPECT_NE(report.gpus.empty(), report.note.empty());
}

}  // namespace
}  // namespace tandem::topology
