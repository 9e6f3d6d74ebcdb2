// One request's answer: what a Responder writes, framed for HTTP/1.1, until the connection sends it.
#include <array>
#include <ctime>

#include "absl/strings/str_cat.h"
#include "services/gateway/http/connection.h"

namespace tandem::gateway {
namespace {

std::string HttpDate() {
  const time_t now = time(nullptr);
  struct tm utc;
  gmtime_r(&now, &utc);
  static constexpr std::array<const char*, 7> kDays = {"Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"};
  static constexpr std::array<const char*, 12> kMonths = {"Jan", "Feb", "Mar", "Apr", "May", "Jun",
                                                          "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"};
  char text[64];
  snprintf(text, sizeof(text), "%s, %02d %s %04d %02d:%02d:%02d GMT", kDays[utc.tm_wday], utc.tm_mday,
           kMonths[utc.tm_mon], utc.tm_year + 1900, utc.tm_hour, utc.tm_min, utc.tm_sec);
  return text;
}

}  // namespace

std::string_view ReasonPhrase(int status) {
  switch (status) {
    case 200:
      return "OK";
    case 204:
      return "No Content";
    case 400:
      return "Bad Request";
    case 401:
      return "Unauthorized";
    case 403:
      return "Forbidden";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 408:
      return "Request Timeout";
    case 409:
      return "Conflict";
    case 413:
      return "Content Too Large";
    case 415:
      return "Unsupported Media Type";
    case 417:
      return "Expectation Failed";
    case 429:
      return "Too Many Requests";
    case 431:
      return "Request Header Fields Too Large";
    case 499:
      return "Client Closed Request";
    case 500:
      return "Internal Server Error";
    case 501:
      return "Not Implemented";
    case 503:
      return "Service Unavailable";
    case 504:
      return "Gateway Timeout";
    case 505:
      return "HTTP Version Not Supported";
    default:
      return "Status";
  }
}

Exchange::Exchange(std::weak_ptr<Connection> connection, std::shared_ptr<const ServerState> state, bool head,
                   bool http10, bool keep_alive)
    : connection_(std::move(connection)),
      state_(std::move(state)),
      head_(head),
      http10_(http10),
      keep_alive_(keep_alive) {}

std::string Exchange::Head(int status, std::string_view content_type, const HeaderList& headers,
                           std::optional<size_t> content_length) {
  if (state_->draining.load(std::memory_order_relaxed)) keep_alive_ = false;
  const bool chunked = !content_length.has_value() && !http10_;
  if (!content_length.has_value() && http10_) keep_alive_ = false;
  std::string head = http10_ ? "HTTP/1.0 " : "HTTP/1.1 ";
  const std::string_view reason = ReasonPhrase(status);
  head.append(std::to_string(status)).append(" ").append(reason);
  head.append("\r\nServer: tandem\r\nDate: ").append(HttpDate());
  if (status != 204) {
    if (!content_type.empty()) head.append("\r\nContent-Type: ").append(content_type);
    if (content_length.has_value()) {
      head.append("\r\nContent-Length: ").append(std::to_string(*content_length));
    }
    if (chunked) head.append("\r\nTransfer-Encoding: chunked");
  }
  if (!keep_alive_) {
    head.append("\r\nConnection: close");
  } else if (http10_) {
    head.append("\r\nConnection: keep-alive");
  }
  for (const HeaderList* list : {&headers, &state_->options.extra_headers}) {
    for (const auto& [name, value] : *list) head.append("\r\n").append(name).append(": ").append(value);
  }
  head.append("\r\n\r\n");
  return head;
}

void Exchange::Respond(int status, std::string_view content_type, std::string_view body,
                       const HeaderList& headers) {
  std::function<void()> dropped;  // destroyed outside of the lock
  {
    std::lock_guard lock(mutex_);
    if (phase_ != State::kOpen) return;
    output_ = Head(status, content_type, headers, body.size());
    if (!head_ && status != 204) output_.append(body);
    phase_ = State::kFinished;
    dropped.swap(on_disconnect_);
  }
  Wake();
}

void Exchange::StartStream(int status, std::string_view content_type, const HeaderList& headers) {
  {
    std::lock_guard lock(mutex_);
    if (phase_ != State::kOpen) return;
    output_ = Head(status, content_type, headers, std::nullopt);
    phase_ = State::kStreaming;
  }
  Wake();
}

bool Exchange::Write(std::string_view bytes) {
  bool ok = true;
  {
    std::lock_guard lock(mutex_);
    if (phase_ != State::kStreaming || overflowed_) return false;
    if (bytes.empty() || head_) return true;
    if (output_.size() + in_flight_ + bytes.size() > state_->options.max_output_bytes) {
      overflowed_ = true;
      ok = false;
    } else if (http10_) {
      output_.append(bytes);
    } else {
      char size[24];
      output_.append(size, static_cast<size_t>(snprintf(size, sizeof(size), "%zx\r\n", bytes.size())));
      output_.append(bytes).append("\r\n");
    }
  }
  Wake();
  return ok;
}

void Exchange::Finish() {
  std::function<void()> dropped;
  {
    std::lock_guard lock(mutex_);
    if (phase_ != State::kStreaming || overflowed_) return;  // a cut stream has no end
    if (!http10_ && !head_) output_.append("0\r\n\r\n");
    phase_ = State::kFinished;
    dropped.swap(on_disconnect_);
  }
  Wake();
}

void Exchange::Drop() {
  std::function<void()> dropped;
  bool open = false;
  {
    std::lock_guard lock(mutex_);
    if (overflowed_) return;  // the connection is being cut, and says so
    dropped.swap(on_disconnect_);
    open = phase_ == State::kOpen;
    if (phase_ == State::kStreaming) overflowed_ = true;  // cut: the stream is not whole
  }
  if (open) {
    std::string body;
    if (state_->options.error_body) body = state_->options.error_body(500, "the request was not answered");
    Respond(500, state_->options.error_content_type, body, {});
    return;
  }
  Wake();
}

void Exchange::OnDisconnect(std::function<void()> callback) {
  {
    std::lock_guard lock(mutex_);
    if (phase_ == State::kFinished) return;
    if (phase_ != State::kGone) {
      on_disconnect_.swap(callback);
      return;
    }
  }
  callback();
}

bool Exchange::disconnected() const {
  std::lock_guard lock(mutex_);
  return phase_ == State::kGone || overflowed_;
}

size_t Exchange::unsent_bytes() const {
  std::lock_guard lock(mutex_);
  return output_.size() + in_flight_;
}

bool Exchange::Woken() {
  std::lock_guard lock(mutex_);
  wake_posted_ = false;
  return overflowed_;
}

std::string Exchange::TakeOutput(bool* finished) {
  std::lock_guard lock(mutex_);
  *finished = phase_ == State::kFinished;
  std::string bytes;
  bytes.swap(output_);
  in_flight_ += bytes.size();
  return bytes;
}

void Exchange::Sent(size_t bytes) {
  std::lock_guard lock(mutex_);
  in_flight_ -= std::min(bytes, in_flight_);
}

void Exchange::Disconnected() {
  std::function<void()> callback;
  {
    std::lock_guard lock(mutex_);
    if (phase_ == State::kGone) return;
    if (phase_ != State::kFinished) callback.swap(on_disconnect_);
    phase_ = State::kGone;
    output_ = std::string();
  }
  if (callback) callback();
}

bool Exchange::finished() const {
  std::lock_guard lock(mutex_);
  return phase_ == State::kFinished;
}

bool Exchange::keep_alive() const {
  std::lock_guard lock(mutex_);
  return keep_alive_;
}

void Exchange::Wake() {
  {
    std::lock_guard lock(mutex_);
    if (wake_posted_ || phase_ == State::kGone) return;
    wake_posted_ = true;
  }
  if (const std::shared_ptr<Connection> connection = connection_.lock()) connection->PostFlush();
}

Responder::~Responder() {
  if (exchange_ != nullptr) exchange_->Drop();
}
void Responder::Respond(int status, std::string_view content_type, std::string_view body,
                        const HeaderList& headers) {
  exchange_->Respond(status, content_type, body, headers);
}
void Responder::StartStream(int status, std::string_view content_type, const HeaderList& headers) {
  exchange_->StartStream(status, content_type, headers);
}
bool Responder::Write(std::string_view bytes) { return exchange_->Write(bytes); }
void Responder::Finish() { exchange_->Finish(); }
void Responder::OnDisconnect(std::function<void()> callback) { exchange_->OnDisconnect(std::move(callback)); }
bool Responder::disconnected() const { return exchange_->disconnected(); }
size_t Responder::unsent_bytes() const { return exchange_->unsent_bytes(); }

}  // namespace tandem::gateway
