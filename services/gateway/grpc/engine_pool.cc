#include "services/gateway/grpc/engine_pool.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "common/base/listen.h"
#include "common/base/status_macros.h"
#include "common/telemetry/log.h"
#include "services/gateway/session/model_context.h"

namespace tandem::gateway {
namespace {

using Clock = std::chrono::steady_clock;

// Two million tokens an engine, in some megabytes.
constexpr size_t kRememberedPages = 65536;
// An engine is clearly busier than the least busy one beyond half as many calls again and some: a computed
// prefix saves more than a place in a short queue costs.
constexpr int kBusierBy = 4;
bool ClearlyBusier(int calls, int least) { return calls > least + std::max(kBusierBy, least / 2); }

bool IsName(const HostPort& at) {
  const bool numeric =
      at.host.find(':') != std::string::npos || at.host.find_first_not_of("0123456789.") == std::string::npos;
  return !numeric && at.host != "localhost";
}

// A host with addresses of both families would be counted twice: IPv4 is preferred.
absl::StatusOr<std::vector<std::string>> SystemResolve(const std::string& address) {
  TANDEM_ASSIGN_OR_RETURN(const std::vector<HostPort> found, ResolveListen(address));
  std::vector<std::string> v4, v6;
  for (const HostPort& at : found) {
    (at.host.find(':') == std::string::npos ? v4 : v6).push_back(at.ToString());
  }
  return v4.empty() ? v6 : v4;
}

}  // namespace

absl::StatusOr<std::unique_ptr<EnginePool>> EnginePool::Create(const std::vector<std::string>& addresses,
                                                               const EnginePoolOptions& options) {
  if (addresses.empty()) return absl::InvalidArgumentError("no engine is given (--engine ADDRESS)");
  std::unique_ptr<EnginePool> pool(new EnginePool(options));
  for (const std::string& address : addresses) {
    HostPort at;
    if (!absl::StartsWith(address, "unix:")) {
      TANDEM_ASSIGN_OR_RETURN(at, ParseHostPort(address));
    }
    if (at.host.empty() || !IsName(at)) {
      TANDEM_RETURN_IF_ERROR(pool->Add(address, "", ""));
    } else {
      pool->names_.push_back({address, at.host, absl::OkStatus(), {}});
    }
  }
  for (Name& name : pool->names_) pool->LookUp(name);
  if (!pool->names_.empty()) pool->thread_ = std::thread([raw = pool.get()] { raw->Run(); });
  return pool;
}

EnginePool::~EnginePool() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

absl::Status EnginePool::Add(const std::string& address, const std::string& named, const std::string& host) {
  TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<Engine> engine, Engine::Create(address, options_.engine, host));
  auto member =
      std::make_unique<Member>(Member{std::move(engine), named, "", PrefixMemory(kRememberedPages)});
  std::lock_guard lock(mutex_);
  members_.push_back(std::move(member));
  return absl::OkStatus();
}

void EnginePool::LookUp(Name& name) {
  const absl::StatusOr<std::vector<std::string>> found =
      options_.resolve ? options_.resolve(name.address) : SystemResolve(name.address);
  std::vector<std::string> fresh;
  bool serving = false;
  {
    std::lock_guard lock(mutex_);
    name.status = found.status();
    if (found.ok()) {
      fresh = *found;
      std::sort(fresh.begin(), fresh.end());
      fresh.erase(std::unique(fresh.begin(), fresh.end()), fresh.end());
      for (const auto& member : members_) {
        if (member->named != name.address) continue;
        const auto it = std::find(fresh.begin(), fresh.end(), member->engine->address());
        member->retired = it == fresh.end();
        if (it != fresh.end()) fresh.erase(it);
      }
    }
    for (const auto& member : members_) {
      serving = serving || (member->named == name.address && !member->retired && member->engine->serving());
    }
  }
  // A name that cannot be looked up for a while keeps the engines that it had.
  if (!found.ok() && !serving)
    spdlog::warn("engine {}: {}", name.address, std::string(found.status().message()));
  for (const std::string& address : fresh) {
    spdlog::info("engine {} is at {}", name.address, address);
    if (const absl::Status added = Add(address, name.address, name.host); !added.ok()) {
      spdlog::error("{}", std::string(added.message()));
    }
  }
  name.next = Clock::now() +
              absl::ToChronoMilliseconds(serving ? options_.resolve_serving : options_.resolve_missing);
}

// Only the pool's thread ends engines: that waits for their own threads.
void EnginePool::LetGo() {
  std::vector<std::unique_ptr<Member>> gone;
  {
    std::lock_guard lock(mutex_);
    for (auto& member : members_) {
      // Pick hands engines out under the mutex: one that only the pool holds stays so.
      if (member->retired && member->engine.use_count() == 1 && member->engine->calls() == 0) {
        gone.push_back(std::move(member));
      }
    }
    std::erase(members_, nullptr);
  }
  for (const auto& member : gone) spdlog::info("engine {} is gone", member->engine->address());
}

void EnginePool::Run() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    const Name& first = *std::min_element(names_.begin(), names_.end(),
                                          [](const Name& a, const Name& b) { return a.next < b.next; });
    changed_.wait_until(lock, first.next, [this] { return stopping_; });
    if (stopping_) return;
    lock.unlock();
    for (Name& name : names_) {
      if (name.next <= Clock::now()) LookUp(name);
    }
    LetGo();
    lock.lock();
  }
}

absl::StatusOr<std::shared_ptr<Engine>> EnginePool::Pick(const Want& want) {
  struct Candidate {
    Member* member;
    bool degraded, refused;
    int calls;
  };
  std::vector<Candidate> candidates;
  std::vector<std::string> reasons;
  bool other_model = false;
  std::lock_guard lock(mutex_);
  // With one engine there is nothing to remember prompts for.
  std::vector<uint64_t> pages;
  if (members_.size() > 1) pages = PrefixHashes(want.prompt);
  for (const Name& name : names_) {
    if (!name.status.ok())
      reasons.push_back(absl::StrCat("engine ", name.address, ": ", name.status.message()));
  }
  for (const auto& member : members_) {
    const std::shared_ptr<Engine>& engine = member->engine;
    if (member->retired) continue;
    if (const absl::Status status = engine->status(); !status.ok()) {
      reasons.push_back(absl::StrCat("engine ", engine->address(), ": ", status.message()));
      continue;
    }
    if (!want.fingerprint.empty() && engine->model()->limits().fingerprint != want.fingerprint) {
      other_model = true;
      continue;
    }
    const bool refused = std::find(want.refused.begin(), want.refused.end(), engine) != want.refused.end();
    candidates.push_back({member.get(), !engine->degraded().empty(), refused, engine->calls()});
  }
  if (candidates.empty()) {
    if (other_model) return absl::FailedPreconditionError("the engine serves another model now");
    if (reasons.empty()) reasons.push_back("no engine has an address");
    return absl::UnavailableError(absl::StrJoin(reasons, "; "));
  }
  const auto worse = [](const Candidate& c) { return std::pair(c.degraded, c.refused); };
  const auto least = [&](const Candidate& a, const Candidate& b) {
    return std::tuple(worse(a), a.calls) < std::tuple(worse(b), b.calls);
  };
  const Candidate best_off = *std::min_element(candidates.begin(), candidates.end(), least);
  const Candidate* best = nullptr;
  size_t best_pages = 0;
  for (const Candidate& candidate : candidates) {
    if (worse(candidate) != worse(best_off) || ClearlyBusier(candidate.calls, best_off.calls)) continue;
    Member& member = *candidate.member;
    if (std::string instance = member.engine->instance_id(); instance != member.instance) {
      member.prefixes.Clear();  // it has started anew, with an empty cache
      member.instance = std::move(instance);
    }
    const size_t known = member.prefixes.Match(pages);
    if (best != nullptr && std::pair(known, -candidate.calls) <= std::pair(best_pages, -best->calls))
      continue;
    best = &candidate;
    best_pages = known;
  }
  best->member->prefixes.Add(pages);
  return best->member->engine;
}

absl::Status EnginePool::status() const {
  std::vector<std::string> reasons;
  std::lock_guard lock(mutex_);
  for (const Name& name : names_) {
    if (!name.status.ok())
      reasons.push_back(absl::StrCat("engine ", name.address, ": ", name.status.message()));
  }
  for (const auto& member : members_) {
    if (member->retired) continue;
    absl::Status status = member->engine->status();
    if (status.ok()) return status;
    reasons.push_back(absl::StrCat("engine ", member->engine->address(), ": ", status.message()));
  }
  if (reasons.empty()) reasons.push_back("no engine has an address");
  return absl::UnavailableError(absl::StrJoin(reasons, "; "));
}

absl::Status EnginePool::Admits(absl::Duration patience) const {
  absl::Status serving = status();
  if (serving.ok()) return serving;
  const absl::Time now = absl::Now();
  for (const std::shared_ptr<Engine>& engine : engines()) {
    if (!absl::IsFailedPrecondition(engine->status()) && now - engine->lost_since() < patience) {
      return absl::OkStatus();
    }
  }
  return serving;
}

absl::Status EnginePool::Ready() const {
  TANDEM_RETURN_IF_ERROR(status());
  absl::Status found = absl::OkStatus();
  for (const std::shared_ptr<Engine>& engine : engines()) {
    if (!engine->serving()) continue;
    const std::string degraded = engine->degraded();
    if (degraded.empty()) return absl::OkStatus();
    found = absl::UnavailableError(absl::StrCat("engine ", engine->address(), ": ", degraded));
  }
  return found;
}

std::shared_ptr<const ModelContext> EnginePool::model() const {
  std::shared_ptr<const ModelContext> known;
  std::lock_guard lock(mutex_);
  for (const auto& member : members_) {
    std::shared_ptr<const ModelContext> model = member->engine->model();
    if (model == nullptr) continue;
    if (member->engine->serving() && !member->retired) return model;
    if (known == nullptr) known = std::move(model);
  }
  return known;
}

std::vector<std::shared_ptr<Engine>> EnginePool::engines() const {
  std::vector<std::shared_ptr<Engine>> list;
  std::lock_guard lock(mutex_);
  for (const auto& member : members_) {
    if (!member->retired) list.push_back(member->engine);
  }
  return list;
}

}  // namespace tandem::gateway
