// The gateway's side of the Engine service: one attention engine, watched, its model known.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/rpc/server.h"
#include "services/gateway/session/model_context.h"

namespace tandem::v1 {
class GenerateEvent;
class GenerateRequest;
}  // namespace tandem::v1

namespace tandem::gateway {

// Calls come one at a time, from gRPC's threads; OnEngineStalled from the engine's own, at any time, the last
// one maybe after OnEngineDone. `tag` is what Generate was given.
class EngineListener {
 public:
  virtual ~EngineListener() = default;
  virtual void OnEngineEvent(uint64_t tag, const v1::GenerateEvent& event) = 0;
  virtual void OnEngineDone(uint64_t tag, const absl::Status& status) = 0;  // once, last
  // The engine is degraded, and nothing has come for a while. Said again and again.
  virtual void OnEngineStalled(uint64_t /*tag*/) {}
};

// A call under way. Thread-safe.
class EngineCall {
 public:
  virtual ~EngineCall() = default;
  virtual void Cancel() = 0;
};

struct EngineOptions {
  rpc::TlsOptions tls;
  std::string model_id;
  absl::Duration poll_serving = absl::Seconds(1);         // between checks of an engine that serves
  absl::Duration poll_missing = absl::Milliseconds(200);  // and of one that does not
  absl::Duration check_timeout = absl::Seconds(3);        // of one check
  absl::Duration stalled = absl::Seconds(2);              // without an event, where the engine is degraded
};

// One engine. A thread of its own asks Engine.Describe again and again: it finds out when the engine serves,
// takes over its metadata when the model is new, and notices its end. Thread-safe.
class Engine {
 public:
  // `name`: the host that the address came from, for its certificate; empty: the address itself.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(const std::string& address,
                                                        const EngineOptions& options,
                                                        const std::string& name = "");
  ~Engine();  // no call may be under way

  const std::string& address() const;
  bool serving() const;
  // OK, or why it does not serve: Unavailable; FailedPrecondition if its model cannot be used.
  absl::Status status() const;
  // When it ceased to serve; InfinitePast: it never did, or it serves.
  absl::Time lost_since() const;
  // What the engine itself says is in the way of computing (its experts are lost); empty: nothing. It takes
  // sequences all the same, and they wait.
  std::string degraded() const;
  // The model it serves, or served last; null before the first contact.
  std::shared_ptr<const ModelContext> model() const;
  std::string backend() const;
  // New at each start of the engine; empty before the first contact.
  std::string instance_id() const;
  int calls() const;  // under way

  // Never null. The listener is kept until OnEngineDone.
  std::shared_ptr<EngineCall> Generate(v1::GenerateRequest request, absl::Time deadline,
                                       std::shared_ptr<EngineListener> listener, uint64_t tag);
  // A call found it unavailable: it counts as not serving until the next check, which comes at once.
  void Suspect(const absl::Status& status);

 private:
  struct Impl;
  explicit Engine(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

}  // namespace tandem::gateway
