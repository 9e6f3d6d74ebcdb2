#include "common/base/status_macros.h"

#include "absl/strings/str_cat.h"

namespace tandem {

absl::Status Annotate(const absl::Status& status, std::string_view context) {
  if (status.ok()) return status;
  absl::string_view head(context.data(), context.size());
  absl::Status out(status.code(), absl::StrCat(head, ": ", status.message()));
  status.ForEachPayload(
      [&](absl::string_view url, const absl::Cord& payload) { out.SetPayload(url, payload); });
  return out;
}

}  // namespace tandem
