#include "services/gateway/openai/api_error.h"

#include <nlohmann/json.hpp>

#include "common/rpc/channel.h"

namespace tandem::gateway {
namespace {

constexpr int kBusyRetrySeconds = 1;
constexpr int kUnavailableRetrySeconds = 2;

void Classify(ApiError& error) {
  switch (error.status) {
    case 400:
      error.code = "bad_request";
      break;
    case 401:
      error.code = "invalid_api_key";
      break;
    case 404:
      error.code = "not_found";
      break;
    case 405:
      error.code = "method_not_allowed";
      break;
    case 408:
      error.code = "request_timeout";
      break;
    case 413:
      error.code = "request_too_large";
      break;
    case 417:
      error.code = "expectation_failed";
      break;
    case 429:
      error.type = "rate_limit_error";
      error.code = "rate_limit_exceeded";
      error.retry_after = kBusyRetrySeconds;
      break;
    case 431:
      error.code = "headers_too_large";
      break;
    case 501:
      error.code = "not_implemented";
      break;
    case 505:
      error.code = "http_version_not_supported";
      break;
    case 499:
      error.type = "server_error";
      error.code = "cancelled";
      break;
    case 503:
      error.type = "server_error";
      error.code = "service_unavailable";
      error.retry_after = kUnavailableRetrySeconds;
      break;
    case 504:
      error.type = "server_error";
      error.code = "timeout";
      break;
    default:
      if (error.status >= 500) {
        error.type = "server_error";
        error.code = "internal_error";
      }
  }
}

}  // namespace

std::string ApiError::ToJson() const {
  nlohmann::ordered_json error;
  error["message"] = message;
  error["type"] = type;
  error["param"] = param.empty() ? nlohmann::ordered_json(nullptr) : nlohmann::ordered_json(param);
  error["code"] = code.empty() ? nlohmann::ordered_json(nullptr) : nlohmann::ordered_json(code);
  nlohmann::ordered_json root;
  root["error"] = std::move(error);
  // What a client sent may stand in the message, and need not be UTF-8.
  return root.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

ApiError BadRequest(std::string_view message, std::string_view param, std::string_view code) {
  ApiError error;
  error.message = message;
  error.param = param;
  error.code = code;
  return error;
}

ApiError FromHttpStatus(int status, std::string_view message) {
  ApiError error;
  error.status = status;
  error.message = message;
  Classify(error);
  return error;
}

ApiError FromStatus(const absl::Status& status) {
  int http = rpc::HttpStatusOf(status.code());
  if (status.code() == absl::StatusCode::kOutOfRange) http = 400;
  ApiError error = FromHttpStatus(http, std::string_view(status.message().data(), status.message().size()));
  if (status.code() == absl::StatusCode::kOutOfRange) error.code = "context_length_exceeded";
  if (status.code() == absl::StatusCode::kInvalidArgument) error.code = "invalid_value";
  return error;
}

}  // namespace tandem::gateway
