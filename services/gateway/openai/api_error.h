// Errors in OpenAI's shape.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace tandem::gateway {

struct ApiError {
  int status = 400;  // HTTP
  std::string message;
  std::string type = "invalid_request_error";
  std::string param;    // the field's path, "messages[1].content"; empty: null
  std::string code;     // empty: null
  int retry_after = 0;  // seconds; 0: none

  // {"error": {"message", "type", "param", "code"}}
  std::string ToJson() const;
};

// A request's own fault.
ApiError BadRequest(std::string_view message, std::string_view param = {},
                    std::string_view code = "invalid_value");

// The error for a status of ours: 400, 429 and 503 with Retry-After, 504, 500.
ApiError FromStatus(const absl::Status& status);

// The error for an HTTP status that needs no more words (404, 405, 408, 413, 431, ...).
ApiError FromHttpStatus(int status, std::string_view message);

}  // namespace tandem::gateway
