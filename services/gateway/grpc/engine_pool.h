// The engines that a gateway holds, and which of them gets a sequence.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "services/gateway/grpc/engine.h"
#include "services/gateway/grpc/prefix_memory.h"

namespace tandem::gateway {

struct EnginePoolOptions {
  EngineOptions engine;
  // The numeric addresses ("10.0.0.7:10010") of one with a name ("attention:10010"); null: the system's
  // resolver. Called by Create and by the pool's thread.
  std::function<absl::StatusOr<std::vector<std::string>>(const std::string& address)> resolve;
  absl::Duration resolve_serving =
      absl::Seconds(10);  // between look-ups of a name some engine of which serves
  absl::Duration resolve_missing = absl::Seconds(1);  // and of one without
};

// All engines are of one model. Thread-safe.
class EnginePool {
 public:
  // Addresses: "unix:/path", "host:port". A host that is a name (but localhost) stands for all addresses that
  // it has: each is an engine. Names are looked up again and again: new addresses join, those that are gone
  // get no more sequences and are let go when theirs have ended. A name without an address yet is no error.
  static absl::StatusOr<std::unique_ptr<EnginePool>> Create(const std::vector<std::string>& addresses,
                                                            const EnginePoolOptions& options);
  ~EnginePool();  // no call may be under way, and nobody may hold an engine

  struct Want {
    std::string fingerprint;                           // of the model; empty: any
    std::span<const int32_t> prompt;                   // all tokens that the engine will get
    std::span<const std::shared_ptr<Engine>> refused;  // taken only where there is no other
  };
  // The engine for a sequence, of those that serve the model. First come engines with nothing in the way of
  // computing, then those that did not refuse it, then those that are not clearly busier than the least busy
  // one; among these the one that has had the longest part of the prompt in whole pages; then the one with
  // the fewest calls. Unavailable says of each engine why not; FailedPrecondition: engines serve, but another
  // model.
  absl::StatusOr<std::shared_ptr<Engine>> Pick(const Want& want);

  // The model that is served, by an engine that serves or by one that did; null before the first contact.
  std::shared_ptr<const ModelContext> model() const;
  // OK if an engine serves.
  absl::Status status() const;
  // OK if an engine serves, or was lost less than `patience` ago and may come back: sequences wait for it.
  absl::Status Admits(absl::Duration patience) const;
  // OK if an engine serves and nothing is in the way of its computing.
  absl::Status Ready() const;
  std::vector<std::shared_ptr<Engine>> engines() const;

 private:
  struct Member {
    std::shared_ptr<Engine> engine;
    std::string named;     // the address with a name that it is of; empty: it was given as it is
    std::string instance;  // that `prefixes` are of
    PrefixMemory prefixes;
    bool retired = false;  // the name has it no more
  };
  struct Name {
    std::string address;
    std::string host;
    absl::Status status;  // of the latest look-up
    std::chrono::steady_clock::time_point next;
  };

  explicit EnginePool(const EnginePoolOptions& options) : options_(options) {}
  absl::Status Add(const std::string& address, const std::string& named, const std::string& host);
  void LookUp(Name& name);
  void LetGo();
  void Run();

  const EnginePoolOptions options_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;
  std::vector<std::unique_ptr<Member>> members_;
  std::vector<Name> names_;  // `status` is guarded by mutex_, the rest is the thread's after Create
  std::thread thread_;
};

}  // namespace tandem::gateway
