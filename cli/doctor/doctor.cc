#include "cli/doctor/doctor.h"

#include <algorithm>
#include <optional>
#include <ostream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "cli/serve/preflight.h"
#include "cli/util/format.h"
#include "common/kernels/kernels.h"
#include "common/topology/cpu_list.h"

namespace tandem::cli {
namespace {

using Level = Finding::Level;

constexpr uint64_t kHugePage = 2 << 20;
constexpr uint64_t kLowFiles = 1024;

void ExamineCpu(const Machine& m, std::vector<Finding>& out) {
  const topology::Topology& t = *m.topology;
  const bool smt = t.cpus() > t.cores();
  out.push_back({Level::kOk, "processor",
                 absl::StrCat(t.cpu_model().empty() ? "unknown model" : Printable(t.cpu_model()), "; ",
                              t.sockets(), t.sockets() == 1 ? " socket, " : " sockets, ", t.cores(),
                              " cores, ", t.cpus(), smt ? " hardware threads" : " threads"),
                 ""});
  for (const topology::Node& node : t.nodes()) {
    std::vector<int> cpus = node.CpusInOrder();
    std::sort(cpus.begin(), cpus.end());
    out.push_back({Level::kOk, "NUMA node",
                   absl::StrCat(absl::StrJoin(node.os_nodes, "+"), ": CPUs ", topology::FormatCpuList(cpus),
                                ", ", FormatBytes(node.memory_bytes), " of memory, ",
                                FormatBytes(node.memory_free_bytes), " free"),
                   ""});
  }
  if (!t.unused_nodes().empty()) {
    out.push_back({Level::kChange, "NUMA node",
                   absl::StrCat("nodes ", absl::StrJoin(t.unused_nodes(), ", "),
                                " have no CPUs of their own that we may use: their memory stays idle"),
                   "give the process the CPUs of all nodes (taskset, docker --cpuset-cpus)"});
  }
  if (t.cpu_quota() > 0 && t.cpu_quota() < t.cores()) {
    out.push_back(
        {Level::kChange, "CPU quota",
         absl::StrFormat("the cgroup grants %.1f CPUs' worth of time on %d cores: threads will be stopped "
                         "in the middle of their work",
                         t.cpu_quota(), t.cores()),
         "run without a CPU quota (docker: no --cpus)"});
  }
  const bool simd = m.isa != "scalar";
  out.push_back({simd ? Level::kOk : Level::kChange, "instructions", absl::StrCat("kernels run as ", m.isa),
                 simd ? "" : "a processor with AVX2 is many times faster"});
}

void ExamineMemory(const Machine& m, std::vector<Finding>& out) {
  const topology::MemoryInfo& memory = m.memory;
  std::string text =
      absl::StrCat(FormatBytes(memory.total_bytes), ", ", FormatBytes(memory.available_bytes), " available");
  if (memory.cgroup_limit_bytes) {
    absl::StrAppend(&text, "; this cgroup may have ", FormatBytes(*memory.cgroup_limit_bytes), ", ",
                    FormatBytes(memory.cgroup_available_bytes), " of them still");
  }
  out.push_back({Level::kOk, "memory", text, ""});

  const topology::HugePages& huge = m.huge_pages;
  uint64_t reserved = 0;
  for (const topology::HugePagePool& pool : huge.pools) reserved += pool.free * pool.page_bytes;
  if (m.expert_bytes > 0 && reserved >= m.expert_bytes) {
    out.push_back({Level::kOk, "huge pages", absl::StrCat(FormatBytes(reserved), " reserved and free"), ""});
  } else if (huge.thp.empty()) {
    out.push_back(
        {Level::kChange, "huge pages", "this kernel has no transparent huge pages",
         m.expert_bytes == 0
             ? "reserve huge pages for the model: tandem doctor --model FILE says how many"
             : absl::StrCat("sysctl -w vm.nr_hugepages=", (m.expert_bytes + kHugePage - 1) / kHugePage)});
  } else if (huge.thp == "never") {
    out.push_back({Level::kChange, "huge pages", "transparent huge pages are off: experts are read slower",
                   "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"});
  } else {
    out.push_back(
        {Level::kOk, "huge pages",
         absl::StrCat("transparent (", huge.thp, "), ", FormatBytes(reserved), " reserved and free"), ""});
  }
  const bool shmem_huge = huge.shmem == "advise" || huge.shmem == "always" || huge.shmem == "within_size" ||
                          huge.shmem == "force";
  if (!huge.shmem.empty() && !shmem_huge && (m.expert_bytes == 0 || reserved < m.expert_bytes)) {
    out.push_back({Level::kChange, "shared memory",
                   absl::StrCat("shmem_enabled is ", huge.shmem,
                                ": the experts' weights lie in private memory, from which a GPU cannot take "
                                "those of long prompts (with --arena shared it can, in small pages)"),
                   "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled"});
  } else if (!huge.shmem.empty()) {
    out.push_back({Level::kOk, "shared memory", absl::StrCat("shmem_enabled is ", huge.shmem), ""});
  }
  if (m.swap_bytes > 0 && m.swappiness.value_or(0) > 10) {
    out.push_back({Level::kChange, "swapping",
                   absl::StrCat("swappiness ", *m.swappiness, " with ", FormatBytes(m.swap_bytes),
                                " of swap: weights may be written out"),
                   "sysctl -w vm.swappiness=1"});
  } else {
    out.push_back({Level::kOk, "swapping",
                   m.swap_bytes == 0 ? "no swap" : absl::StrCat("swappiness ", m.swappiness.value_or(0)),
                   ""});
  }
}

void ExamineLimits(const Machine& m, std::vector<Finding>& out) {
  const uint64_t wanted = std::max<uint64_t>(m.expert_bytes, uint64_t{1} << 30);
  if (!m.memlock.soft || *m.memlock.soft >= wanted) {
    out.push_back({Level::kOk, "memlock",
                   m.memlock.soft ? FormatBytes(*m.memlock.soft) + " may be locked" : "no limit", ""});
  } else {
    out.push_back({Level::kChange, "memlock",
                   absl::StrCat("only ", FormatBytes(*m.memlock.soft), " may be locked in memory"),
                   "ulimit -l unlimited (docker: --ulimit memlock=-1; systemd: LimitMEMLOCK=infinity)"});
  }
  if (!m.open_files.soft || *m.open_files.soft > kLowFiles) {
    out.push_back({Level::kOk, "open files",
                   m.open_files.soft ? absl::StrCat("up to ", *m.open_files.soft) : "no limit", ""});
  } else {
    out.push_back({Level::kChange, "open files",
                   absl::StrCat("only ", *m.open_files.soft, ": too few for some hundred clients"),
                   "ulimit -n 65536"});
  }
}

void ExamineGpus(const Machine& m, std::vector<Finding>& out) {
  for (const topology::Gpu& gpu : m.gpus.gpus) {
    std::string text = absl::StrCat(gpu.index, ": ", Printable(gpu.name));
    if (gpu.memory_bytes > 0) absl::StrAppend(&text, ", ", FormatBytes(gpu.memory_bytes));
    if (gpu.compute_major > 0) {
      absl::StrAppend(&text, ", compute capability ", gpu.compute_major, ".", gpu.compute_minor);
    }
    if (gpu.pcie_width > 0) absl::StrAppend(&text, ", ", gpu.pcie_speed, " x", gpu.pcie_width);
    if (gpu.os_numa_node >= 0) absl::StrAppend(&text, ", NUMA node ", gpu.os_numa_node);
    if (!m.gpus.driver.empty()) absl::StrAppend(&text, ", ", m.gpus.driver);
    out.push_back({Level::kOk, "GPU", text, ""});
  }
  if (m.gpus.gpus.empty()) {
    out.push_back(
        {Level::kOk, "GPU", absl::StrCat("none (", m.gpus.note, "): the CPU backend does all of it"), ""});
  } else if (!m.gpus.note.empty()) {
    out.push_back({Level::kChange, "GPU", m.gpus.note, "install the NVIDIA driver's user-space libraries"});
  }
}

void ExamineModel(const std::string& path, const topology::MemoryInfo& memory, int processes,
                  Machine& machine, std::vector<Finding>& out) {
  const absl::StatusOr<OpenedModel> model = OpenModel(path, "auto");
  if (!model.ok()) {
    out.push_back({Level::kWrong, "model", Printable(std::string(model.status().message())), "another file"});
    return;
  }
  const auto plan = PlanMemory(*model->file, model->config, 0, processes);
  if (!plan.ok()) {
    out.push_back(
        {Level::kWrong, "model", std::string(plan.status().message()), "fewer expert processes (--numa)"});
    return;
  }
  machine.expert_bytes = plan->expert_bytes;
  const uint64_t needed = ServingBytes({}, *plan, model->config, processes + 2);
  const absl::Status fits = CheckMemory(needed, *plan, memory);
  out.push_back(
      {fits.ok() ? Level::kOk : Level::kWrong, "model",
       fits.ok() ? absl::StrCat(Printable(model->config.name), " needs ", FormatBytes(needed), ": it fits")
                 : std::string(fits.message()),
       fits.ok() ? "" : "more memory, a smaller quantization, or sharing it out over several hosts"});
}

}  // namespace

std::vector<Finding> Examine(const Machine& machine) {
  std::vector<Finding> out;
  ExamineCpu(machine, out);
  ExamineMemory(machine, out);
  ExamineLimits(machine, out);
  ExamineGpus(machine, out);
  return out;
}

void AddDoctorFlags(Command& command, DoctorOptions* o) {
  command.Text("model", &o->model, "Does this GGUF file or folder fit?", {"gguf-path"});
}

int RunDoctor(const DoctorOptions& options, std::ostream& out) {
  const absl::StatusOr<topology::Topology> topology = topology::Topology::Detect();
  if (!topology.ok()) {
    out << "wrong   processor: " << std::string(topology.status().message()) << "\n";
    return 1;
  }
  Machine machine;
  machine.topology = &*topology;
  machine.memory = topology::ReadMemoryInfo();
  machine.huge_pages = topology::ReadHugePages();
  machine.gpus = topology::DetectGpus();
  machine.memlock = topology::MemlockLimit();
  machine.open_files = topology::OpenFilesLimit();
  machine.swappiness = topology::ReadSwappiness();
  machine.swap_bytes = topology::ReadSwapTotalBytes();
  machine.isa = std::string(kernels::IsaName(kernels::ActiveIsa()));
  std::vector<Finding> of_model;
  if (!options.model.empty()) {
    ExamineModel(options.model, machine.memory, static_cast<int>(topology->nodes().size()), machine,
                 of_model);
  }
  std::vector<Finding> findings = Examine(machine);
  findings.insert(findings.end(), of_model.begin(), of_model.end());
  int changes = 0, wrong = 0;
  for (const Finding& finding : findings) {
    const char* level = finding.level == Level::kOk       ? "ok"
                        : finding.level == Level::kChange ? "change"
                                                          : "WRONG";
    changes += finding.level == Level::kChange;
    wrong += finding.level == Level::kWrong;
    out << absl::StrFormat("%-7s %-14s %s\n", level, finding.topic, finding.text);
    if (!finding.advice.empty()) out << absl::StrFormat("%-7s %-14s -> %s\n", "", "", finding.advice);
  }
  if (wrong > 0) {
    out << "\nSomething is wrong.\n";
  } else if (changes > 0) {
    out << "\nIt works; " << changes << (changes == 1 ? " change" : " changes") << " would make it better.\n";
  } else {
    out << "\nAll is well.\n";
  }
  return wrong > 0 ? 1 : 0;
}

}  // namespace tandem::cli
