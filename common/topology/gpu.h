// NVIDIA GPUs of this machine, found without linking CUDA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tandem::topology {

struct Gpu {
  int index = 0;  // as CUDA counts (CUDA_VISIBLE_DEVICES applies)
  std::string name;
  uint64_t memory_bytes = 0;  // 0: unknown (the driver's library is not there)
  int compute_major = 0;      // 0: unknown
  int compute_minor = 0;
  std::string pci;         // "0000:41:00.0"; empty: unknown
  std::string pcie_speed;  // the best link both ends can do, as sysfs says: "32.0 GT/s PCIe"; empty: unknown
  int pcie_width = 0;      // lanes; 0: unknown
  int os_numa_node = -1;   // -1: unknown
};

struct GpuReport {
  std::vector<Gpu> gpus;
  std::string driver;  // "CUDA 12.8" of the driver's library; empty: none
  std::string note;    // why there are none or why they cannot be used, for people; empty: nothing to say
};

// Asks libcuda.so.1 if it is there (no context is made), else /proc/driver/nvidia. Thread-safe.
GpuReport DetectGpus(const std::string& root = "/");

// The part of DetectGpus that needs no driver library.
std::vector<Gpu> ReadProcGpus(const std::string& root);

}  // namespace tandem::topology
