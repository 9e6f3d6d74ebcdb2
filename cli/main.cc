// The `tandem` command.
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>

#include "cli/bench/bench.h"
#include "cli/chat/options.h"
#include "cli/doctor/doctor.h"
#include "cli/flags/command_line.h"
#include "cli/inspect/inspect.h"
#include "cli/plan/plan.h"
#include "cli/serve/serve.h"
#include "cli/synth/synth.h"
#include "common/rpc/lifecycle.h"

namespace {

// The exit code of a command whose output is what it is for: a full disk must not pass for success.
int AfterOutput(int code) {
  errno = 0;
  std::cout.flush();
  // Of C's stream, too: what it had to write earlier may have failed without std::cout's knowing.
  if (std::cout.good() && std::ferror(stdout) == 0) return code;
  std::cerr << "tandem: cannot write to the standard output"
            << (errno == 0 ? std::string() : std::string(": ") + std::strerror(errno)) << "\n";
  return code == 0 ? 1 : code;
}

}  // namespace

int main(int argc, char** argv) {
  tandem::rpc::PrepareProcess();
  using namespace tandem::cli;
  CommandLine line("Tandem serves DeepSeek-R1/V3 from one GPU and the memory of a server", TANDEM_VERSION);
  ServeOptions serve;
  ChatOptions chat;
  InspectOptions inspect;
  DoctorOptions doctor;
  SynthOptions synth;
  BenchOptions bench;
  PlanOptions plan;
  AddServeFlags(line.Add("serve", "Start the server: all processes of this machine"), &serve);
  AddChatFlags(line.Add("chat", "Talk to a running server, or start one"), &chat);
  AddInspectFlags(line.Add("inspect", "Show a model file: metadata, tensors, memory plan"), &inspect);
  AddDoctorFlags(line.Add("doctor", "Check this machine: what is fine, what to change"), &doctor);
  AddPlanFlags(line.Add("plan", "Predict how fast a machine runs a model, and what fits"), &plan);
  AddSynthFlags(line.Add("synth", "Write a model with random weights, for measurements"), &synth);
  AddBenchFlags(
      line.Add("bench", "Measure this machine (roofline, moe, roundtrip, load) or a server (serve)"), &bench);
  const std::optional<int> code = line.Parse({argv + 1, argv + argc}, &std::getenv, std::cout, std::cerr);
  if (code) return AfterOutput(*code);
  for (const std::string& flag : line.ignored()) {
    std::cerr << "tandem: " << flag << " has no meaning here and is ignored\n";
  }
  if (line.command() == "serve") return RunServe(serve);  // what it has for the standard output is no result
  if (line.command() == "chat") return RunChat(chat);
  if (line.command() == "inspect") return AfterOutput(RunInspect(inspect, std::cout, std::cerr));
  if (line.command() == "plan") return AfterOutput(RunPlan(plan, std::cout, std::cerr));
  if (line.command() == "synth") return AfterOutput(RunSynth(synth, std::cout, std::cerr));
  if (line.command() == "bench") return AfterOutput(RunBench(bench, std::cout, std::cerr));
  return AfterOutput(RunDoctor(doctor, std::cout));
}
