#include "services/expert_cpu/options.h"

#include <CLI/CLI.hpp>
#include <charconv>
#include <iostream>
#include <map>

#include "common/flags/sources.h"
#include "common/topology/cpu_list.h"

namespace tandem::expert {
namespace {

// "A<separator>B", two whole numbers of at most 9 digits.
bool ParsePair(const std::string& text, char separator, int64_t& a, int64_t& b) {
  const size_t at = text.find(separator);
  if (at == std::string::npos || at > 9 || text.size() - at > 10) return false;
  const char* data = text.data();
  const char* end = data + text.size();
  const auto first = std::from_chars(data, data + at, a);
  const auto second = std::from_chars(data + at + 1, end, b);
  return first.ec == std::errc() && first.ptr == data + at && second.ec == std::errc() && second.ptr == end &&
         a >= 0 && b >= 0;
}

}  // namespace

std::optional<Options> ParseOptions(int argc, const char* const* argv, int* exit_code) {
  Options o;
  std::string slice, experts, cpus, precision = "fast", ring = "on";
  CLI::App app("tandem-expert: holds a shard of a model's routed experts and answers batched calls over gRPC",
               "tandem-expert");
  app.set_version_flag("--version", TANDEM_VERSION);
  app.add_option("--model,--model-path,--gguf-path", o.model,
                 "GGUF file, the first file of a split model, or a folder with either (needed)");
  app.add_option("--listen", o.listen, "HOST:PORT or unix:PATH; may be given several times")->delimiter(',');
  app.add_option("--metrics-listen", o.metrics_listen, "HOST:PORT of GET /metrics; none if left out");
  app.add_option("--slice", slice, "K/N: slice K (from 0) of N of every expert's intermediate dimension");
  app.add_option("--experts", experts, "A-B: experts A to B-1 only");
  app.add_option("--threads,--cpu-infer,--cpu_infer", o.threads, "Compute threads; 0: one a physical core")
      ->check(CLI::Range(0, 4096));
  app.add_option("--cpus", cpus, "CPUs to pin the threads to, as in 0-7,16; overrides those of --numa-node");
  app.add_option("--numa-node", o.numa_node, "Bind threads and memory to this NUMA node; -1: do not")
      ->check(CLI::Range(-1, 1023));
  app.add_option("--numa-nodes", o.numa_nodes, "Simulate so many NUMA nodes; 0: those of the machine")
      ->check(CLI::Range(0, 64));
  app.add_option("--precision", precision, "fast, or reference: dequantized weights, sums in double")
      ->check(CLI::IsMember({"fast", "reference"}));
  app.add_option("--max-tokens", o.max_tokens, "Most tokens in a call")->check(CLI::Range(1, 65536));
  app.add_option("--load-threads", o.load_threads, "Reads in flight while loading")
      ->check(CLI::Range(1, 256));
  const std::map<std::string, ArenaKind> arenas = {{"auto", ArenaKind::kAuto},
                                                   {"hugetlb", ArenaKind::kHugeTlb},
                                                   {"shared-huge", ArenaKind::kSharedHuge},
                                                   {"shared", ArenaKind::kSharedSmall},
                                                   {"private", ArenaKind::kAnonymous}};
  std::string arena = "auto";
  app.add_option(
         "--arena", arena,
         "Memory of the weights: auto (huge pages if there are any), hugetlb, shared-huge, shared, private")
      ->check(CLI::IsMember({"auto", "hugetlb", "shared-huge", "shared", "private"}));
  app.add_option("--memory-check", o.memory_check,
                 "Refuse a shard that does not fit into the memory that is available (default true)");
  app.add_option("--ring", ring,
                 "on: clients on this host may call through shared memory; off: only over gRPC")
      ->check(CLI::IsMember({"on", "off"}));
  app.add_option("--ring-socket", o.ring_socket,
                 "Path of the Unix socket that hands the memory over; chosen from --listen if left out");
  app.add_option("--ring-spin-us", o.ring_spin_us,
                 "Microseconds to look for the next call before sleeping; -1: by the CPUs to spare")
      ->check(CLI::Range(int64_t{-1}, int64_t{60'000'000}));
  app.add_option("--tls-cert", o.tls.certificate_file, "PEM certificate for the TCP addresses");
  app.add_option("--tls-key", o.tls.key_file, "PEM key of the certificate");
  app.add_option("--tls-ca", o.tls.ca_file, "PEM CA that clients' certificates must be of");
  flags::AddEnvironmentAndFile(app);

  const auto wrong = [&](const std::string& what) {
    std::cerr << "tandem-expert: " << what << "\nRun with --help for the flags.\n";
    *exit_code = 2;
    return std::nullopt;
  };
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& e) {
    *exit_code = app.exit(e);
    return std::nullopt;
  } catch (const CLI::Error& e) {
    return wrong(e.what());
  }
  if (o.model.empty()) return wrong("--model is missing");
  if (!slice.empty() && !ParsePair(slice, '/', o.shard.slice_index, o.shard.slice_count)) {
    return wrong("--slice " + slice + " is not K/N, as in 0/2");
  }
  if (!experts.empty() && !ParsePair(experts, '-', o.shard.expert_begin, o.shard.expert_end)) {
    return wrong("--experts " + experts + " is not A-B, as in 0-128");
  }
  const absl::StatusOr<std::vector<int>> list = topology::ParseCpuList(cpus);
  if (!list.ok()) return wrong("--cpus " + cpus + ": " + std::string(list.status().message()));
  o.cpus = *list;
  o.precision = precision == "reference" ? kernels::Precision::kReference : kernels::Precision::kFast;
  o.arena = arenas.at(arena);
  o.ring = ring == "on";
  if (!o.ring_socket.empty() && o.ring_socket[0] != '/') {
    return wrong("--ring-socket " + o.ring_socket + " is not an absolute path");
  }
  if (o.listen.empty()) o.listen = {"127.0.0.1:10020"};
  return o;
}

}  // namespace tandem::expert
