#include "common/telemetry/log.h"

#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_sinks.h>

#include <cstdio>
#include <cstdlib>
#include <memory>

namespace tandem::telemetry {
namespace {

// The message with control characters escaped, so that text from outside cannot begin a line of its own.
class OneLineMessage : public spdlog::custom_flag_formatter {
 public:
  void format(const spdlog::details::log_msg& message, const std::tm&, spdlog::memory_buf_t& out) override {
    for (const char c : message.payload) {
      const auto byte = static_cast<unsigned char>(c);
      if (byte >= 0x20 && byte != 0x7f) {
        out.push_back(c);
        continue;
      }
      char escaped[8];
      const int n = c == '\n' ? std::snprintf(escaped, sizeof escaped, "\\n")
                              : std::snprintf(escaped, sizeof escaped, "\\x%02x", byte);
      out.append(escaped, escaped + n);
    }
  }
  std::unique_ptr<custom_flag_formatter> clone() const override { return std::make_unique<OneLineMessage>(); }
};

std::string EscapePercent(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '%') out += '%';
    out += c;
  }
  return out;
}

}  // namespace

void InitLog(const std::string& service) {
  auto formatter = std::make_unique<spdlog::pattern_formatter>();
  formatter->add_flag<OneLineMessage>('*').set_pattern("%Y-%m-%d %H:%M:%S.%e %L " + EscapePercent(service) +
                                                       ": %*");
  auto logger = std::make_shared<spdlog::logger>(service, std::make_shared<spdlog::sinks::stderr_sink_mt>());
  logger->set_formatter(std::move(formatter));
  logger->flush_on(spdlog::level::trace);

  spdlog::level::level_enum level = spdlog::level::info;
  const char* wanted = std::getenv("TANDEM_LOG");
  bool known = true;
  if (wanted != nullptr && *wanted != '\0') {
    level = spdlog::level::from_str(wanted);
    // from_str answers "off" for what it does not know.
    known = level != spdlog::level::off || std::string(wanted) == "off";
    if (!known) level = spdlog::level::info;
  }
  logger->set_level(level);
  spdlog::set_default_logger(std::move(logger));
  if (!known)
    spdlog::warn("TANDEM_LOG={} is not one of trace, debug, info, warn, error, off: info it is", wanted);
}

}  // namespace tandem::telemetry
