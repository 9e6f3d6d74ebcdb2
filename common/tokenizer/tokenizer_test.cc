#include "common/tokenizer/tokenizer.h"

#include <gtest/gtest.h>
#include <algorithm>

#include <chrono>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/gguf/gguf.h"
#include "common/tokenizer/test_util.h"
#include "common/tokenizer/unicode.h"
#include "nlohmann/json.hpp"

namespace tandem::tokenizer {
namespace {

using Ids = std::vector<int32_t>;

std::unique_ptr<Tokenizer> Make(VocabularySpec spec) {
  auto tokenizer = Tokenizer::FromVocabulary(std::move(spec));
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return tokenizer.ok() ? *std::move(tokenizer) : nullptr;
}

// The real vocabulary; nullptr if it is not on this machine.
const Tokenizer* DeepSeek() {
  static const Tokenizer* const tokenizer = []() -> const Tokenizer* {
    const auto path = SharedPath("tokenizer/tokenizer.json");
    if (!path) return nullptr;
    auto spec = SpecFromTokenizerJson(*path);
    EXPECT_TRUE(spec.ok()) << spec.status();
    return Make(*std::move(spec)).release();
  }();
  return tokenizer;
}

const Tokenizer* Demo() {
  static const Tokenizer* const tokenizer = []() -> const Tokenizer* {
    auto file = gguf::File::Open(SourcePath("models/tinyr1-Q4_K_M.gguf"));
    EXPECT_TRUE(file.ok()) << file.status();
    if (!file.ok()) return nullptr;
    auto made = Tokenizer::FromGguf(**file);
    EXPECT_TRUE(made.ok()) << made.status();
    return made.ok() ? made->release() : nullptr;
  }();
  return tokenizer;
}

#define SKIP_WITHOUT_DEEPSEEK()                                     \
  if (DeepSeek() == nullptr)                                        \
  GTEST_SKIP() << "../shared/tokenizer/tokenizer.json is not here " \
                  "(TANDEM_SHARED)"

TEST(DeepSeekTokenizer, GoldenTextsBothWays) {
  SKIP_WITHOUT_DEEPSEEK();
  const auto golden = nlohmann::json::parse(ReadFile(*SharedPath("tokenizer/golden_public.json")));
  ASSERT_EQ(golden.size(), 110u);
  for (const auto& entry : golden) {
    const auto text = entry["text"].get<std::string>();
    const auto ids = entry["ids"].get<Ids>();
    EXPECT_EQ(DeepSeek()->Encode(text), ids) << text;
    EXPECT_EQ(DeepSeek()->Decode(ids), text);
  }
}

TEST(DeepSeekTokenizer, EveryBaseTokenDecodesAndSpecialsAreFound) {
  SKIP_WITHOUT_DEEPSEEK();
  EXPECT_EQ(DeepSeek()->bos_id(), 0);
  EXPECT_EQ(DeepSeek()->FindToken("<｜User｜>"), 128803);
  EXPECT_TRUE(DeepSeek()->IsControl(128803));
  EXPECT_TRUE(DeepSeek()->IsUserDefined(128798));
  EXPECT_EQ(Ids(DeepSeek()->end_of_generation_ids().begin(), DeepSeek()->end_of_generation_ids().end()),
            (Ids{1, 128805}));
  EXPECT_EQ(DeepSeek()->Encode("<｜User｜>hi<｜Assistant｜>", {.parse_special = true}),
            (Ids{128803, DeepSeek()->Encode("hi")[0], 128804}));
}

TEST(DeepSeekTokenizer, NoQuadraticCase) {
  SKIP_WITHOUT_DEEPSEEK();
  const auto repeat = [](std::string_view what) {
    std::string out;
    while (out.size() < (1u << 20)) out.append(what);
    return out;
  };
  const std::string letters_then_space = repeat("   x");
  for (const std::string& text :
       {repeat("a"), repeat(" "), repeat("1"), repeat("中"), repeat("!"), repeat("\n"), repeat("\n "),
        repeat("ab"), repeat("の"), repeat("é"), repeat("\xFF"), repeat("<"), repeat("<｜"), repeat("\u0301"),
        repeat(" !"), letters_then_space}) {
    const auto start = std::chrono::steady_clock::now();
    const Ids ids = DeepSeek()->Encode(text, {.parse_special = true});
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    // A quadratic merge of 2^20 symbols takes minutes; the bound leaves room for sanitizers and busy
    // machines.
    EXPECT_LT(seconds, 10.0) << text.substr(0, 12);
    EXPECT_EQ(DeepSeek()->Decode(ids), text) << text.substr(0, 12);
  }
}

TEST(DeepSeekTokenizer, ThreadsAgree) {
  SKIP_WITHOUT_DEEPSEEK();
  const std::string text =
      "The quick brown fox jumps over 12345 lazy dogs; 他说你好。 def f(x):\n    return x\n";
  const Ids expected = Make(*SpecFromTokenizerJson(*SharedPath("tokenizer/tokenizer.json")))->Encode(text);
  std::vector<Ids> results(4);
  std::vector<std::thread> threads;
  for (Ids& result : results) {
    threads.emplace_back([&result, &text] { result = DeepSeek()->Encode(text); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Ids& result : results) EXPECT_EQ(result, expected);
}

TEST(DemoTokenizer, GoldenPrompts) {
  ASSERT_NE(Demo(), nullptr);
  const auto golden = nlohmann::json::parse(ReadFile(SourcePath("tests/golden/demo/golden.json")));
  size_t count = 0;
  for (const auto& prompt : golden["prompts"]) {
    const auto text = prompt["text"].get<std::string>();
    const auto tokens = prompt["tokens"].get<Ids>();
    // The text begins with BOS already: it must not come twice.
    EXPECT_EQ(Demo()->Encode(text, {.add_special = true, .parse_special = true}), tokens) << text;
    EXPECT_EQ(Demo()->Decode(tokens), text);
    EXPECT_EQ(Demo()->Decode(prompt["greedy"].get<Ids>()), prompt["greedy_text"].get<std::string>());
    ++count;
  }
  EXPECT_GE(count, 4u);
  EXPECT_EQ(Demo()->vocab_size(), golden["vocab_size"].get<int>());
}

// What is too long is found to be so; what is not comes whole. Also where all is one control token after the
// other, the longest of all, or every second character a marker.
TEST(Tokenizer, MayEndEarlyWithMoreThanTheMost) {
  for (const std::string piece : {"hello 12 ", "<｜begin▁of▁sentence｜>", "日本語🙂", "h\xEE\x80\x80"}) {
    for (const int times : {1, 7, 40, 3000}) {
      std::string text;
      for (int i = 0; i < times; ++i) text += piece;
      EncodeOptions options{.parse_special = true, .marker = "\xEE\x80\x80"};
      const Ids all = Demo()->Encode(text, options);
      for (const size_t most : {size_t{0}, size_t{6}, size_t{100}, all.size() - 1, all.size()}) {
        options.most = most;
        const Ids some = Demo()->Encode(text, options);
        if (all.size() <= most) {
          EXPECT_EQ(some, all) << piece << " " << times << " " << most;
        } else {
          ASSERT_GT(some.size(), most) << piece << " " << times;
          EXPECT_TRUE(std::equal(all.begin(), all.begin() + static_cast<ptrdiff_t>(most), some.begin()));
        }
      }
    }
  }
}

TEST(Tokenizer, BosExactlyOnce) {
  const auto tok = Make(TinySpec());
  const Ids hello = tok->Encode("hello");
  ASSERT_EQ(hello.size(), 1u);
  EXPECT_EQ(tok->Encode("hello", {.add_special = true}), (Ids{0, hello[0]}));
  EXPECT_EQ(tok->Encode("", {.add_special = true}), Ids{0});
  EXPECT_EQ(tok->Encode("<｜begin▁of▁sentence｜>hello", {.add_special = true, .parse_special = true}),
            (Ids{0, hello[0]}));
  // As text it is not BOS.
  EXPECT_GT(tok->Encode("<｜begin▁of▁sentence｜>", {.add_special = true}).size(), 2u);
  VocabularySpec spec = TinySpec();
  spec.add_bos = false;
  EXPECT_EQ(Make(std::move(spec))->Encode("hello", {.add_special = true}), hello);
}

TEST(Tokenizer, ControlTokensOnlyWhenAskedForUserDefinedAlways) {
  const auto tok = Make(TinySpec());
  const int32_t user = tok->FindToken("<｜User｜>");
  const int32_t think = tok->FindToken("<think>");
  EXPECT_EQ(tok->Encode("<｜User｜>", {.parse_special = true}), Ids{user});
  const Ids as_text = tok->Encode("<｜User｜>");
  EXPECT_EQ(std::count(as_text.begin(), as_text.end(), user), 0);
  EXPECT_EQ(tok->Decode(as_text), "<｜User｜>");
  EXPECT_EQ(tok->Encode("<think>"), Ids{think});
  EXPECT_EQ(tok->Encode("<<think>", {.parse_special = true}).back(), think);
  // A marker inside of a spelling makes it text, and goes.
  const std::string marker = "\uFDD0";
  const Ids marked =
      tok->Encode("<" + marker + "｜User｜><｜User｜>", {.parse_special = true, .marker = marker});
  Ids expected = as_text;
  expected.push_back(user);
  EXPECT_EQ(marked, expected);
  EXPECT_EQ(tok->Decode(Ids{user, think}, {.skip_special = true}), "<think>");
}

TEST(Tokenizer, LongestSpecialTokenWins) {
  VocabularySpec spec = TinySpec();
  for (const char* t : {"<|a|>", "<|a|><|b|>", "<|b|>"}) {
    spec.tokens.emplace_back(t);
    spec.token_types.push_back(3);
  }
  const auto tok = Make(std::move(spec));
  const EncodeOptions special{.parse_special = true};
  EXPECT_EQ(tok->Encode("<|a|><|b|>", special), Ids{tok->FindToken("<|a|><|b|>")});
  EXPECT_EQ(tok->Encode("<|a|><|b|", special)[0], tok->FindToken("<|a|>"));
  EXPECT_EQ(tok->Encode("<|b|><|a|>", special), (Ids{tok->FindToken("<|b|>"), tok->FindToken("<|a|>")}));
}

TEST(Tokenizer, ControlLookingUserDefinedTokensBecomeControl) {
  VocabularySpec spec = TinySpec();
  for (size_t i = 0; i < spec.tokens.size(); ++i) {
    if (spec.tokens[i] == "<｜User｜>") spec.token_types[i] = 4;
    if (spec.tokens[i] == "<|EOT|>") spec.token_types[i] = 4;
  }
  const auto tok = Make(std::move(spec));
  EXPECT_TRUE(tok->IsControl(tok->FindToken("<｜User｜>")));
  EXPECT_GT(tok->Encode("<｜User｜>").size(), 1u);
  EXPECT_TRUE(tok->IsEndOfGeneration(tok->FindToken("<|EOT|>")));
}

TEST(Tokenizer, OutOfRangeIdsAreHarmless) {
  const auto tok = Make(TinySpec());
  EXPECT_EQ(tok->Decode(Ids{-1, 1 << 30, tok->FindToken("hello")}), "hello");
  EXPECT_EQ(tok->TokenBytes(-5), "");
  EXPECT_FALSE(tok->IsControl(tok->vocab_size()));
}

// What must be refused, and what the message must name.
TEST(Tokenizer, BadVocabularies) {
  const auto expect = [](VocabularySpec spec, absl::StatusCode code, const std::vector<std::string>& words) {
    const auto result = Tokenizer::FromVocabulary(std::move(spec));
    EXPECT_EQ(result.status().code(), code) << result.status();
    for (const std::string& word : words) {
      EXPECT_NE(std::string(result.status().message()).find(word), std::string::npos)
          << word << " is missing in: " << result.status();
    }
  };
  const auto bad = [&](auto change, const std::vector<std::string>& words) {
    VocabularySpec spec = TinySpec();
    change(spec);
    expect(std::move(spec), absl::StatusCode::kInvalidArgument, words);
  };
  VocabularySpec spec = TinySpec();
  spec.model = "llama";
  expect(spec, absl::StatusCode::kUnimplemented, {"tokenizer.ggml.model", "\"llama\"", "gpt2"});
  spec = TinySpec();
  spec.pre = "viking";
  expect(spec, absl::StatusCode::kUnimplemented,
         {"tokenizer.ggml.pre", "\"viking\"", "deepseek-v3", "kimi-k2"});
  bad([](auto& s) { s.tokens.clear(); }, {"tokenizer.ggml.tokens", "0"});
  bad([](auto& s) { s.token_types.pop_back(); }, {"tokenizer.ggml.token_type"});
  bad([](auto& s) { s.token_types[7] = 9; }, {"token_type[7]", "9"});
  bad([](auto& s) { s.token_types[7] = 6; }, {"tokens[7]", "byte"});
  bad([](auto& s) { s.tokens[5] = s.tokens[6]; }, {"tokens[6]", "tokens[5]", "same"});
  bad([](auto& s) { s.tokens[5] = ""; }, {"tokens[5]", "empty"});
  bad([](auto& s) { s.tokens[5] = "\xC3("; }, {"tokens[5]", "UTF-8"});
  bad([](auto& s) { s.tokens[3 + 'A'] = "AAAA"; }, {"byte 65"});
  bad([](auto& s) { s.merges[1] = "ll"; }, {"merges[1]", "space"});
  bad([](auto& s) { s.merges[1] = " l"; }, {"merges[1]"});
  bad([](auto& s) { s.merges[1] = "l "; }, {"merges[1]"});
  bad([](auto& s) { s.merges[1] = "l l l"; }, {"merges[1]"});
  bad([](auto& s) { s.merges[1] = "q z"; }, {"merges[1]", "\"qz\""});
  bad([](auto& s) { s.merges[1] = "qq z"; }, {"merges[1]", "\"qq\""});
  bad([](auto& s) { s.bos_id = 5000; }, {"bos_token_id", "5000"});
  bad([](auto& s) { s.eos_id = -7; }, {"eos_token_id", "-7"});
  bad([](auto& s) { s.bos_id = -1; }, {"add_bos_token"});
  bad([](auto& s) { s.tokens.back() = std::string(1000, 'x'); }, {"1000 bytes"});
}

TEST(Tokenizer, GgufKeysAreChecked) {
  const VocabularySpec tiny = TinySpec();
  const auto parse = [&](auto change) {
    gguf::Writer writer;
    writer.AddString("general.architecture", "deepseek2");
    change(writer);
    const std::string bytes = writer.SerializeMetadata();
    auto file = gguf::File::ParseHeader(
        std::span(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()), "test.gguf");
    EXPECT_TRUE(file.ok()) << file.status();
    return Tokenizer::FromGguf(**file);
  };
  const auto base = [&](gguf::Writer& w) {
    w.AddString("tokenizer.ggml.model", "gpt2");
    w.AddString("tokenizer.ggml.pre", "deepseek-v3");
    w.AddStrings("tokenizer.ggml.tokens", tiny.tokens);
    w.AddStrings("tokenizer.ggml.merges", tiny.merges);
    w.AddInts("tokenizer.ggml.token_type", tiny.token_types);
  };
  auto good = parse([&](gguf::Writer& w) {
    base(w);
    w.AddUint("tokenizer.ggml.bos_token_id", 0);
    w.AddBool("tokenizer.ggml.add_bos_token", true);
  });
  ASSERT_TRUE(good.ok()) << good.status();
  EXPECT_EQ((*good)->Encode("hello", {.add_special = true}).size(), 2u);
  auto far = parse([&](gguf::Writer& w) {
    base(w);
    w.AddUint("tokenizer.ggml.eos_token_id", 4000000000u);
  });
  EXPECT_EQ(far.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(std::string(far.status().message()).find("eos_token_id is 4000000000"), std::string::npos)
      << far.status();
  auto none = parse([&](gguf::Writer&) {});
  EXPECT_EQ(none.status().code(), absl::StatusCode::kNotFound);
  auto wrong_type = parse([&](gguf::Writer& w) {
    w.AddString("tokenizer.ggml.model", "gpt2");
    w.AddString("tokenizer.ggml.pre", "deepseek-v3");
    w.AddInts("tokenizer.ggml.tokens", {1, 2, 3});
  });
  EXPECT_EQ(wrong_type.status().code(), absl::StatusCode::kInvalidArgument) << wrong_type.status();
}

// Random bytes and random mixtures of special tokens, cut characters and text: nothing crashes, decoding
// gives the bytes back, and ids are in range.
TEST(Tokenizer, MutatedTextsSurvive) {
  const auto tok = Make(TinySpec());
  std::mt19937 random(20250120);
  const std::vector<std::string> parts = {
      "<｜User｜>", "<think>", "hello world", "中文の", "\xE4\xB8", "\xF0\x9F\x98\x80",
      "\xFF\xC0",   "123456",  "  \n\n ",     "!?",     "\u0301",   "\xED\xA0\x80",
      "\uFDD0",     "<｜",     "\t\r\n",      "'ll"};
  for (const char* pre : {"deepseek-v3", "deepseek-llm", "deepseek-coder", "kimi-k2", "gpt-2"}) {
    VocabularySpec spec = TinySpec();
    spec.pre = pre;
    const auto other = Make(std::move(spec));
    for (int round = 0; round < 1000; ++round) {
      std::string text;
      for (unsigned n = random() % 12; n > 0; --n) text += parts[random() % parts.size()];
      for (unsigned n = random() % 4; n > 0 && !text.empty(); --n) {
        text[random() % text.size()] = static_cast<char>(random());
      }
      for (const bool special : {false, true}) {
        const Ids ids = other->Encode(text, {.parse_special = special});
        for (const int32_t id : ids) ASSERT_TRUE(other->IsValid(id));
        ASSERT_EQ(other->Decode(ids), text) << pre;
      }
    }
  }
}

TEST(SanitizeUtf8, ReplacesIllFormedSequences) {
  EXPECT_EQ(SanitizeUtf8("aé中😀"), "aé中😀");
  EXPECT_EQ(SanitizeUtf8("\xE4\xB8"
                         "a"),
            "\uFFFDa");
  EXPECT_EQ(SanitizeUtf8("\xF0\x9F\x98"), "\uFFFD");
  EXPECT_EQ(SanitizeUtf8("\xC0\x80"), "\uFFFD\uFFFD");
  EXPECT_EQ(SanitizeUtf8("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(SanitizeUtf8("\xF4\x90\x80\x80"), "\uFFFD\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(SanitizeUtf8("\x80\xFF"), "\uFFFD\uFFFD");
}

TEST(StreamDecoder, EveryCutOfMultibyteText) {
  const auto tok = Make(TinySpec());
  const std::string text = "aé中😀\u0301ß 🇩🇪 e\n";
  // One token a byte: the stream sees every cut.
  StreamDecoder decoder(tok.get());
  std::string streamed;
  for (const char c : text) {
    std::string byte_token;
    const Ids ids = tok->Encode(std::string(1, c));
    ASSERT_EQ(ids.size(), 1u);
    const std::string piece = decoder.Push(ids[0]);
    EXPECT_EQ(piece, SanitizeUtf8(piece));
    EXPECT_EQ(piece.find("\uFFFD"), std::string::npos) << "a character was split";
    streamed += piece;
  }
  EXPECT_EQ(streamed, text);
  EXPECT_EQ(decoder.Flush(), "");
}

TEST(StreamDecoder, RandomTokensEqualTheWholeDecode) {
  const auto tok = Make(TinySpec());
  std::mt19937 random(7);
  StreamDecoder decoder(tok.get());
  for (int round = 0; round < 3000; ++round) {
    Ids ids;
    for (unsigned n = random() % 20; n > 0; --n) {
      // Mostly bytes above 0x7F: beginnings and middles of characters in every disorder.
      ids.push_back(random() % 4 == 0 ? static_cast<int32_t>(random() % tok->vocab_size())
                                      : static_cast<int32_t>(3 + 0x80 + random() % 0x80));
    }
    std::string streamed;
    for (const int32_t id : ids) {
      const std::string piece = decoder.Push(id);
      ASSERT_EQ(piece, SanitizeUtf8(piece));
      streamed += piece;
    }
    streamed += decoder.Flush();
    ASSERT_EQ(streamed, SanitizeUtf8(tok->Decode(ids)));
  }
}

TEST(StreamDecoder, SkipsSpecialTokens) {
  const auto tok = Make(TinySpec());
  StreamDecoder decoder(tok.get(), {.skip_special = true});
  EXPECT_EQ(decoder.Push(tok->FindToken("<｜User｜>")), "");
  EXPECT_EQ(decoder.Push(tok->FindToken("hello")), "hello");
  EXPECT_EQ(decoder.Push(-1), "");
}

}  // namespace
}  // namespace tandem::tokenizer
