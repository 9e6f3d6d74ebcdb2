// Which instruction sets the machine, its operating system and this build have, and which one is used.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "common/base/check.h"
#include "common/kernels/dispatch.h"
#include "common/kernels/kernels.h"
#include "common/kernels/reading.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tandem::kernels {
namespace {

constexpr Isa kAllIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vnni, Isa::kAmx};

#if defined(__x86_64__)

uint64_t ReadXcr0() {
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// Linux hands out the tile registers only to processes that ask: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool RequestTilePermission() {
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

Isa Detect() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(1, 0, &a, &b, &c, &d) == 0) return Isa::kScalar;
  const bool osxsave = (c >> 27 & 1) != 0;
  const bool fma = (c >> 12 & 1) != 0;
  const bool f16c = (c >> 29 & 1) != 0;
  const bool avx = (c >> 28 & 1) != 0;
  if (!osxsave || !avx || !fma || !f16c) return Isa::kScalar;
  const uint64_t xcr0 = ReadXcr0();
  if ((xcr0 & 0x6) != 0x6) return Isa::kScalar;  // SSE and AVX state
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return Isa::kScalar;
  if ((b >> 5 & 1) == 0 || internal::Avx2Tables() == nullptr) return Isa::kScalar;
  const bool avx512 = (b >> 16 & 1) != 0 && (b >> 17 & 1) != 0 && (b >> 30 & 1) != 0 && (b >> 31 & 1) != 0;
  if (!avx512 || (xcr0 & 0xe0) != 0xe0 || internal::Avx512Tables() == nullptr) return Isa::kAvx2;
  const bool vnni = (c >> 11 & 1) != 0;
  if (!vnni || internal::Avx512VnniTables() == nullptr) return Isa::kAvx512;
  const bool amx = (d >> 24 & 1) != 0 && (d >> 25 & 1) != 0 && (c >> 8 & 1) != 0;  // AMX-TILE, AMX-INT8, GFNI
  if (!amx || (xcr0 & 0x60000) != 0x60000 || internal::AmxTables() == nullptr || !RequestTilePermission()) {
    return Isa::kAvx512Vnni;
  }
  return Isa::kAmx;
}

#else

Isa Detect() { return Isa::kScalar; }

#endif

Isa Choose() {
  const Isa best = DetectIsa();
  const char* wanted = std::getenv("TANDEM_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (Isa isa : kAllIsas) {
    if (IsaName(isa) != wanted) continue;
    if (isa <= best) return isa;
    std::fprintf(stderr, "TANDEM_ISA=%s: this machine or build has no more than %s, which is used\n", wanted,
                 std::string(IsaName(best)).c_str());
    return best;
  }
  std::fprintf(stderr,
               "TANDEM_ISA=%s: unknown, %s is used; known are scalar, avx2, avx512, avx512-vnni, amx\n",
               wanted, std::string(IsaName(best)).c_str());
  return best;
}

Isa& Active() {
  static Isa isa = Choose();
  return isa;
}

}  // namespace

std::string_view IsaName(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Vnni:
      return "avx512-vnni";
    case Isa::kAmx:
      return "amx";
  }
  return "unknown";
}

Isa DetectIsa() {
  static const Isa isa = Detect();
  return isa;
}

Isa ActiveIsa() { return Active(); }

void SetActiveIsaForTesting(Isa isa) {
  TANDEM_CHECK(isa <= DetectIsa());
  Active() = isa;
}

std::vector<Isa> AvailableIsas() {
  std::vector<Isa> isas;
  for (Isa isa : kAllIsas) {
    if (isa <= DetectIsa()) isas.push_back(isa);
  }
  return isas;
}

namespace {

std::atomic<ReadingWay>& Way() {
  static std::atomic<ReadingWay> way = DefaultReadingWay();
  return way;
}

// The family of an AMD processor (Zen 1 and 2: 0x17, Zen 3 and 4: 0x19, Zen 5: 0x1a); 0: another maker's.
int AmdFamily() {
#if defined(__x86_64__)
  static const int family = [] {
    uint32_t a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid(0, &a, &b, &c, &d) == 0 || b != signature_AMD_ebx || c != signature_AMD_ecx ||
        d != signature_AMD_edx || __get_cpuid(1, &a, &b, &c, &d) == 0) {
      return 0;
    }
    return static_cast<int>((a >> 8 & 15) + (a >> 20 & 255));
  }();
  return family;
#else
  return 0;
#endif
}

}  // namespace

std::string_view ReadingWayName(ReadingWay way) {
  switch (way) {
    case ReadingWay::kPanels:
      return "panels";
    case ReadingWay::kPanelsRows:
      return "panels-rows";
    case ReadingWay::kFollowed:
      return "followed";
    case ReadingWay::kRows:
      return "rows";
    case ReadingWay::kRowsTwice:
      return "rows-twice";
  }
  return "unknown";
}

ReadingWay DefaultReadingWay() {
  // Zen 5; those before it, of which a Zen 4 was measured, are a third faster by panels, which in turn a Zen
  // 5 serves worse.
  constexpr int kZen5 = 0x1a;
  const int amd = AmdFamily();
  if (amd >= kZen5) return ReadingWay::kRowsTwice;
  return amd != 0 ? ReadingWay::kPanels : ReadingWay::kFollowed;
}

ReadingWay ActiveReadingWay() { return Way().load(std::memory_order_relaxed); }
void SetReadingWay(ReadingWay way) { Way().store(way, std::memory_order_relaxed); }

namespace internal {

namespace {
const Reading* reading_for_testing = nullptr;
}  // namespace

Reading ReadingOf(int64_t cols, int64_t tokens) {
  if (reading_for_testing != nullptr) return *reading_for_testing;
  // Shorter rows are too few bytes to pay for turning the sums of each: measured with 2048 and 7168 columns
  // to be worth it, and with some hundreds not.
  const bool worth_rows = cols >= 2048;
  // So many columns make rows that a processor's own prefetchers may follow, all 16 of a panel at once,
  // unless products with many tokens keep it from them.
  const bool follows = cols >= 4096;
  switch (ActiveReadingWay()) {
    case ReadingWay::kPanels:
      break;
    case ReadingWay::kPanelsRows:
      return {kSecondRequests, !follows && worth_rows, 1024};
    case ReadingWay::kFollowed:
      return {follows && tokens <= 3 ? kNoRequests : kSecondRequests, !follows && worth_rows, 3072};
    case ReadingWay::kRows:
      return {kSecondRequests, worth_rows, 3072};
    case ReadingWay::kRowsTwice:
      return {kTwoRequests, worth_rows, 12288};
  }
  return {kSecondRequests, false, 0};
}

void SetReadingForTesting(const Reading* reading) { reading_for_testing = reading; }

bool HasBf16Tiles() {
#if defined(__x86_64__)
  static const bool has = [] {
    uint32_t a = 0, b = 0, c = 0, d = 0;
    if (BulkAmxTables() == nullptr || DetectIsa() < Isa::kAmx) return false;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d >> 22 & 1) == 0) return false;  // AMX-BF16
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 5 & 1) != 0;              // AVX512-BF16
  }();
  return has;
#else
  return false;
#endif
}

const KTables& TablesFor(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      break;
    case Isa::kAvx2:
      return *Avx2Tables();
    case Isa::kAvx512:
      return *Avx512Tables();
    case Isa::kAvx512Vnni:
      return *Avx512VnniTables();
    case Isa::kAmx:
      return *AmxTables();
  }
  return *ScalarTables();
}

namespace {
const KTables* override_for_testing = nullptr;
}  // namespace

void SetTablesForTesting(const KTables* tables) { override_for_testing = tables; }

const KTables& ActiveTables() {
  return override_for_testing != nullptr ? *override_for_testing : TablesFor(Active());
}

}  // namespace internal
}  // namespace tandem::kernels
