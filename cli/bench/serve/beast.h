// What Asio and Beast are called in this folder's .cc files, and what these do alike with them. Heavy: for
// .cc files alone.
#pragma once

#include <utility>  // Asio 1.74's awaitable.hpp uses std::exchange without including it

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http.hpp>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "cli/util/http_client.h"

namespace tandem::cli {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using asio::ip::tcp;
using boost::system::error_code;

// Unavailable names the URL.
inline absl::StatusOr<tcp::resolver::results_type> Resolve(asio::io_context& io, const Url& url) {
  error_code error;
  tcp::resolver resolver(io);
  const tcp::resolver::results_type addresses = resolver.resolve(url.host, url.port, error);
  if (error) return absl::UnavailableError(absl::StrCat(url.ToString(), ": ", error.message()));
  return addresses;
}

}  // namespace tandem::cli
