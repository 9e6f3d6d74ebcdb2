// The page at /: what runs here and what it answers to.
#pragma once

#include <string>
#include <string_view>

namespace tandem::gateway {

// HTML. `model` may be empty (not known yet); `state`: "ready", or why not.
std::string LandingPage(std::string_view model, std::string_view state);

}  // namespace tandem::gateway
