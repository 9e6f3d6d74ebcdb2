#include "common/topology/gpu.h"

#include <dirent.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <string_view>

namespace tandem::topology {
namespace {

// The few calls of the driver's C interface that we need; signatures and attribute numbers from NVIDIA's
// documented, stable ABI.
using CuInit = int (*)(unsigned);
using CuDriverGetVersion = int (*)(int*);
using CuDeviceGetCount = int (*)(int*);
using CuDeviceGet = int (*)(int*, int);
using CuDeviceGetName = int (*)(char*, int, int);
using CuDeviceTotalMem = int (*)(size_t*, int);
using CuDeviceGetAttribute = int (*)(int*, int, int);
using CuGetErrorString = int (*)(int, const char**);
constexpr int kPciBusId = 33;
constexpr int kPciDeviceId = 34;
constexpr int kPciDomainId = 50;
constexpr int kComputeMajor = 75;
constexpr int kComputeMinor = 76;

std::string Join(const std::string& root, const std::string& path) {
  std::string out = root;
  while (!out.empty() && out.back() == '/') out.pop_back();
  return out + path;
}

std::string FirstLine(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

int ToInt(const std::string& text, int otherwise) {
  int value = otherwise;
  return std::sscanf(text.c_str(), "%d", &value) == 1 ? value : otherwise;
}

void ReadPcie(const std::string& root, Gpu& gpu) {
  if (gpu.pci.empty()) return;
  const std::string folder = Join(root, "/sys/bus/pci/devices/" + gpu.pci);
  gpu.pcie_speed = FirstLine(folder + "/max_link_speed");
  gpu.pcie_width = std::max(0, ToInt(FirstLine(folder + "/max_link_width"), 0));
  if (gpu.pcie_width >= 255) gpu.pcie_width = 0;  // virtual devices have no link
  if (gpu.pcie_width == 0) gpu.pcie_speed.clear();
  gpu.os_numa_node = ToInt(FirstLine(folder + "/numa_node"), -1);
}

template <typename F>
F Symbol(void* library, const char* name) {
  return reinterpret_cast<F>(dlsym(library, name));
}

// The library stays open: the driver does not like being unloaded.
bool AskDriver(const std::string& root, GpuReport& report) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return false;
  const auto init = Symbol<CuInit>(library, "cuInit");
  const auto version = Symbol<CuDriverGetVersion>(library, "cuDriverGetVersion");
  const auto count = Symbol<CuDeviceGetCount>(library, "cuDeviceGetCount");
  const auto get = Symbol<CuDeviceGet>(library, "cuDeviceGet");
  const auto name = Symbol<CuDeviceGetName>(library, "cuDeviceGetName");
  const auto memory = Symbol<CuDeviceTotalMem>(library, "cuDeviceTotalMem_v2");
  const auto attribute = Symbol<CuDeviceGetAttribute>(library, "cuDeviceGetAttribute");
  const auto error_string = Symbol<CuGetErrorString>(library, "cuGetErrorString");
  if (!init || !version || !count || !get || !name || !memory || !attribute) {
    report.note = "libcuda.so.1 lacks calls that every driver of the last ten years has";
    return true;
  }
  if (int v = 0; version(&v) == 0 && v > 0) {
    report.driver = "CUDA " + std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
  }
  int devices = 0;
  int error = init(0);
  if (error == 0) error = count(&devices);
  if (error != 0) {
    const char* text = nullptr;
    if (error_string != nullptr) error_string(error, &text);
    report.note = "the NVIDIA driver answers: " + (text != nullptr ? text : "error " + std::to_string(error));
    return true;
  }
  for (int i = 0; i < devices; ++i) {
    int device = 0;
    if (get(&device, i) != 0) continue;
    Gpu gpu;
    gpu.index = i;
    char text[256] = {};
    if (name(text, sizeof text - 1, device) == 0) gpu.name = text;
    if (size_t bytes = 0; memory(&bytes, device) == 0) gpu.memory_bytes = bytes;
    attribute(&gpu.compute_major, kComputeMajor, device);
    attribute(&gpu.compute_minor, kComputeMinor, device);
    int domain = 0, bus = 0, slot = 0;
    if (attribute(&domain, kPciDomainId, device) == 0 && attribute(&bus, kPciBusId, device) == 0 &&
        attribute(&slot, kPciDeviceId, device) == 0) {
      char pci[32];
      std::snprintf(pci, sizeof pci, "%04x:%02x:%02x.0", domain & 0xffff, bus & 0xff, slot & 0xff);
      gpu.pci = pci;
    }
    ReadPcie(root, gpu);
    report.gpus.push_back(std::move(gpu));
  }
  if (report.gpus.empty()) report.note = "the NVIDIA driver sees no GPU";
  return true;
}

}  // namespace

std::vector<Gpu> ReadProcGpus(const std::string& root) {
  std::vector<Gpu> gpus;
  const std::string folder = Join(root, "/proc/driver/nvidia/gpus");
  DIR* dir = opendir(folder.c_str());
  if (dir == nullptr) return gpus;
  std::vector<std::string> names;
  while (const dirent* entry = readdir(dir)) {
    if (entry->d_name[0] != '.') names.emplace_back(entry->d_name);
  }
  closedir(dir);
  std::sort(names.begin(), names.end());
  for (const std::string& pci : names) {
    Gpu gpu;
    gpu.index = static_cast<int>(gpus.size());
    gpu.pci = pci;
    std::ifstream information(folder + "/" + pci + "/information");
    std::string line;
    while (std::getline(information, line)) {  // "Model: 		 NVIDIA GeForce RTX 4090"
      constexpr std::string_view kModel = "Model:";
      if (line.compare(0, kModel.size(), kModel) != 0) continue;
      const size_t begin = line.find_first_not_of(" \t", kModel.size());
      if (begin != std::string::npos) gpu.name = line.substr(begin);
    }
    ReadPcie(root, gpu);
    gpus.push_back(std::move(gpu));
  }
  return gpus;
}

GpuReport DetectGpus(const std::string& root) {
  GpuReport report;
  if (AskDriver(root, report)) return report;
  report.gpus = ReadProcGpus(root);
  report.note =
      report.gpus.empty() ? "no NVIDIA driver" : "the kernel driver is there, but libcuda.so.1 is not";
  return report;
}

}  // namespace tandem::topology
