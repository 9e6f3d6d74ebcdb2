// Sixteen streams at once, each with a question and a way of sampling of its own, and a blow that falls while
// all of them run.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tests/integration/stack.h"

namespace tandem::integration {

inline constexpr int kCrowd = 16;

// Every second one is greedy, the others are drawn with a seed of their own. `tokens` each.
std::vector<Json> CrowdRequests(int tokens);

// Each alone, one after another.
std::vector<Answer> AskAlone(const RestClient& rest, const std::vector<Json>& requests);

// All at once. `strike` is called once, when each of them has had some events; it says what else happens.
std::vector<Answer> AskTogether(const RestClient& rest, const std::vector<Json>& requests,
                                const std::function<void()>& strike);

// Every stream came to its end with the text that it has alone.
void ExpectSame(const std::vector<Answer>& got, const std::vector<Answer>& alone);

// Until no sequence is left anywhere and no page of the KV cache belongs to one.
::testing::AssertionResult WaitIdle(Stack& stack);

}  // namespace tandem::integration
