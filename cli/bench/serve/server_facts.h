// What the load generator must know of a server before it sends a load.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "cli/bench/serve/options.h"
#include "cli/util/http_client.h"

namespace tandem::cli {

struct ServerFacts {
  std::string model;            // for the requests
  int64_t max_context = 0;      // tokens; 0: it does not say
  std::vector<int32_t> tokens;  // ordinary token ids to make prompts of; empty: prompts are text
  double tokens_per_word = 1;   // of WordText, for text
  double overhead_tokens = 0;   // of a prompt without words, for text
};

// Asks /v1/models, /props (llama-server's), /tokenize and, where prompts are text, for two answers of one
// token. Unavailable and the like name the server; InvalidArgument names the flag.
absl::StatusOr<ServerFacts> AskServer(const Url& url, const ServeLoadOptions& options);

// Number of words that text is made of, and the text of a sequence of them.
int64_t WordCount();
std::string WordText(const std::vector<int32_t>& words);

// The JSON of one request. `prompt`: units as in WorkloadOptions.
std::string RequestBody(const ServeLoadOptions& options, const ServerFacts& facts,
                        const std::vector<int32_t>& prompt, int64_t output_tokens, uint64_t seed,
                        bool stream);
const char* RequestPath(const ServeLoadOptions& options);

}  // namespace tandem::cli
