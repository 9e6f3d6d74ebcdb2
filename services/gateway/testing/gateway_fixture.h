// A gateway on free ports in front of a FakeEngine, and a JSON client for it.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "services/gateway/gateway.h"
#include "services/gateway/testing/fake_engine.h"
#include "services/gateway/testing/raw_client.h"

namespace tandem::gateway::testing {

using Json = nlohmann::ordered_json;

// Of a streamed chat or completion.
struct Streamed {
  std::vector<Json> chunks;
  std::string reasoning, content, text, finish;
  bool done = false;  // [DONE] came, last
  Json usage, error;
};

class GatewayFixture : public ::testing::Test {
 protected:
  void SetUp() override {
    engine_ = std::make_unique<FakeEngine>();
    engine_->Start();
    options_.engines = {engine_->address()};
    options_.listen = "127.0.0.1:0";
    options_.grpc_listen = "127.0.0.1:0";
  }

  void Start(bool wait_ready = true) {
    auto gateway = Gateway::Start(options_);
    ASSERT_TRUE(gateway.ok()) << gateway.status();
    gateway_ = std::move(*gateway);
    if (wait_ready) {
      ASSERT_TRUE(WaitReady());
    }
  }
  bool WaitReady(bool ready = true) {
    for (int i = 0; i < 30000 && gateway_->ready() != ready; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return gateway_->ready() == ready;
  }

  static std::string Wire(const std::string& method, const std::string& target, const std::string& body,
                          const std::string& headers = "") {
    return method + " " + target + " HTTP/1.1\r\nHost: t\r\nContent-Length: " + std::to_string(body.size()) +
           "\r\n" + headers + "\r\n" + body;
  }
  HttpReply Call(const std::string& method, const std::string& target, const std::string& body = "",
                 const std::string& headers = "") {
    RawClient client(gateway_->http_port());
    client.Send(Wire(method, target, body, headers));
    return client.ReadReply(method == "HEAD");
  }
  HttpReply Chat(const std::string& fields = "", const std::string& headers = "") {
    return Call("POST", "/v1/chat/completions", ChatBody(fields), headers);
  }
  static std::string ChatBody(const std::string& fields) {
    return R"({"messages":[{"role":"user","content":"What is 1+1?"}])" +
           (fields.empty() ? "" : "," + fields) + "}";
  }
  static Json Parse(const HttpReply& reply) {
    Json json = Json::parse(reply.body, nullptr, false);
    EXPECT_TRUE(reply.complete);
    EXPECT_FALSE(json.is_discarded()) << reply.body;
    return json.is_discarded() ? Json::object() : json;
  }

  static Streamed ParseStream(const HttpReply& reply) {
    Streamed out;
    size_t at = 0;
    while (at < reply.body.size()) {
      const size_t end = reply.body.find("\n\n", at);
      EXPECT_NE(end, std::string::npos) << reply.body.substr(at);
      if (end == std::string::npos) break;
      const std::string event = reply.body.substr(at, end - at);
      at = end + 2;
      EXPECT_EQ(event.substr(0, 6), "data: ");
      EXPECT_FALSE(out.done) << "after [DONE]: " << event;
      const std::string data = event.substr(6);
      if (data == "[DONE]") {
        out.done = true;
        continue;
      }
      Json json = Json::parse(data, nullptr, false);
      EXPECT_FALSE(json.is_discarded()) << data;
      if (json.contains("error")) out.error = json["error"];
      if (json.contains("usage") && json["usage"].is_object()) out.usage = json["usage"];
      if (json.contains("choices") && !json["choices"].empty()) {
        const Json& choice = json["choices"][0];
        if (choice.contains("delta")) {
          out.reasoning += choice["delta"].value("reasoning_content", "");
          out.content += choice["delta"].value("content", "");
        }
        out.text += choice.value("text", "");
        if (choice["finish_reason"].is_string()) out.finish = choice["finish_reason"];
      }
      out.chunks.push_back(std::move(json));
    }
    return out;
  }

  void ExpectError(const HttpReply& reply, int status, const std::string& type, const std::string& param,
                   const std::string& code, const std::string& message) {
    EXPECT_EQ(reply.status, status) << reply.body;
    const Json json = Parse(reply);
    ASSERT_TRUE(json.is_object() && json.contains("error")) << reply.body;
    const Json& error = json["error"];
    EXPECT_EQ(error["type"], type);
    EXPECT_EQ(error["param"], param.empty() ? Json(nullptr) : Json(param));
    EXPECT_EQ(error["code"], code);
    EXPECT_THAT(error["message"].get<std::string>(), ::testing::HasSubstr(message));
  }

  std::unique_ptr<FakeEngine> engine_;
  GatewayOptions options_;
  std::unique_ptr<Gateway> gateway_;
};

}  // namespace tandem::gateway::testing
