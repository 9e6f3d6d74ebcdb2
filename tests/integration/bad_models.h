// Model files that must be refused, each made from the demo model.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tandem::integration {

struct BadModel {
  std::string what;
  std::string path;                // what is given to --model
  std::vector<std::string> words;  // that the error must hold
};

// Writes them into `folder`, which is to outlive their use. Throws if that fails.
std::vector<BadModel> MakeBadModels(const std::string& folder);

// Like the demo model, but with routed experts of twice this machine's memory: a file of holes, which takes
// no disk. Everything about it is right but its size.
struct HugeModel {
  std::string path;
  uint64_t expert_bytes = 0;
};
HugeModel WriteHugeModel(const std::string& folder);

// The demo model under the name "Other": the same weights, another model.
void WriteRenamedModel(const std::string& path);

}  // namespace tandem::integration
