// SPDX-License-Identifier: Apache-2.0
// What a control client sends, as text: cutting it up, reading it, checking the arguments.
#include <string>
#include <string_view>

#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "control/qmp/arguments.h"
#include "control/qmp/message.h"
#include "control/qmp/splitter.h"

namespace minivmm::control::qmp {
namespace {

std::vector<std::string> split(const std::vector<std::string>& pieces) {
  MessageSplitter splitter;
  std::vector<std::string> out;
  for (const std::string& piece : pieces) {
    splitter.feed(piece);
    while (const auto message = splitter.next()) {
      out.push_back(message->problem.empty() ? message->text : "!" + message->problem);
    }
  }
  return out;
}

using Texts = std::vector<std::string>;
constexpr const char* kBad = "!Invalid JSON syntax";

TEST(QmpSplitter, CutsAtTheClosingBrace) {
  EXPECT_EQ(split({R"( {"a":1}{"b":2} )", "\r\n"}), (Texts{R"({"a":1})", R"({"b":2})"}));
  EXPECT_EQ(split({"{\n\"a\":\n{}}"}), (Texts{"{\n\"a\":\n{}}"}));
  EXPECT_EQ(split({R"({"a":"}{\"]\\"})"}), (Texts{R"({"a":"}{\"]\\"})"}));
  EXPECT_EQ(split({"[1]"}), (Texts{"[1]"}));
  EXPECT_EQ(split({"{"}), Texts{});
}

TEST(QmpSplitter, BeginsAnewBehindGarbage) {
  EXPECT_EQ(split({"hello world {}\n{}"}), (Texts{kBad, "{}"}));
  EXPECT_EQ(split({"x\xff{}"}), (Texts{kBad, "{}"}));
  // A text that never ends is given up at a byte that no text has, and a string at its line's end.
  EXPECT_EQ(split({"{\"a\": \xff{}"}), (Texts{kBad, "{}"}));
  EXPECT_EQ(split({"{\"a\n{}"}), (Texts{kBad, "{}"}));
  EXPECT_EQ(split({"\xff\xff{}"}), (Texts{"{}"}));
  EXPECT_EQ(split({"}{}\n{}"}), (Texts{kBad, "{}"}));
}

TEST(QmpSplitter, BoundsAMessage) {
  const std::string fits = "{\"" + std::string(kMostBytes - 4, 'x') + "\"}";
  EXPECT_EQ(split({fits, "{}"}), (Texts{fits, "{}"}));
  const auto large = split({"{\"", std::string(3 * kMostBytes, 'x'), "\"}{}"});
  ASSERT_EQ(large.size(), 2U);
  EXPECT_NE(large[0].find("may have at most"), std::string::npos) << large[0];
  EXPECT_EQ(large[1], "{}");
  const auto nested = [](size_t depth) {
    return std::string(depth, '[') + std::string(depth, ']');
  };
  EXPECT_EQ(split({nested(kMostDepth)}), Texts{nested(kMostDepth)});
  const auto deep = split({nested(kMostDepth + 1) + "{}"});
  ASSERT_EQ(deep.size(), 2U);
  EXPECT_NE(deep[0].find("nested 65 deep"), std::string::npos) << deep[0];
}

TEST(QmpSplitter, DoesNotCareHowTheBytesArrive) {
  const auto seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  constexpr std::string_view kBytes =
      "{}[]\"\\ \n\xff"
      "a";
  for (int round = 0; round < 2000; ++round) {
    std::string text;
    for (auto i = random() % 60; i > 0; --i) text += kBytes[random() % kBytes.size()];
    std::vector<std::string> pieces;
    for (size_t at = 0; at < text.size();) {
      const size_t length = 1 + random() % 7;
      pieces.push_back(text.substr(at, length));
      at += length;
    }
    ASSERT_EQ(split({text}), split(pieces)) << text;
  }
}

std::string failure(const std::string& text, Json* id = nullptr) {
  Json seen;
  try {
    (void)parse_request(text, seen);
    return {};
  } catch (const Failure& e) {
    if (id != nullptr) *id = seen;
    return e.what();
  }
}

TEST(QmpMessage, AnIdIsKnownAlsoOfAWrongMessage) {
  Json id;
  EXPECT_EQ(failure(R"({"id": [3], "execute": 5})", &id),
            "QMP input member 'execute' must be a string");
  EXPECT_EQ(id.dump(), "[3]");
  EXPECT_EQ(error_line(std::make_exception_ptr(Failure("no")), id),
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}, \"id\": [3]}\r\n");
}

TEST(QmpMessage, AnswersAreAsciiWhateverAFileIsCalled) {
  const std::string line = return_line({{"file", "\xc3\xa4\xff\n"}}, {});
  EXPECT_EQ(line, "{\"return\": {\"file\": \"\\u00e4\\ufffd\\n\"}}\r\n");
}

// Scripts look for QEMU's answers as they are: a blank behind colons and commas, none in texts.
TEST(QmpMessage, BlanksAreWhereQemuHasThem) {
  EXPECT_EQ(return_line(Json::object(), {}), "{\"return\": {}}\r\n");
  EXPECT_EQ(return_line(Json::array({1, Json::array(), {{"a", true}, {"b", nullptr}}}), "x"),
            "{\"return\": [1, [], {\"a\": true, \"b\": null}], \"id\": \"x\"}\r\n");
  EXPECT_EQ(return_line({{"a:b,c", "\"x\":1,\\"}, {"d", "\\\""}}, {}),
            "{\"return\": {\"a:b,c\": \"\\\"x\\\":1,\\\\\", \"d\": \"\\\\\\\"\"}}\r\n");
  EXPECT_TRUE(greeting_line().starts_with("{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 0, "))
      << greeting_line();
  EXPECT_NE(event_line("STOP", {}).find("}, \"event\": \"STOP\"}\r\n"), std::string::npos);
}

TEST(QmpMessage, EventsHaveATime) {
  const Json event = Json::parse(event_line("STOP", {}));
  EXPECT_EQ(event["event"], "STOP");
  EXPECT_GT(event["timestamp"]["seconds"].get<int64_t>(), 1'600'000'000);
  EXPECT_LT(event["timestamp"]["microseconds"].get<int64_t>(), 1'000'000);
  EXPECT_FALSE(event.contains("data"));
}

constexpr Parameter kParameters[] = {{"name", Kind::kString},
                                     {"size", Kind::kInteger, true},
                                     {"mode", Kind::kString, true, "safe|hard"},
                                     {"on", Kind::kBoolean, true},
                                     {"list", Kind::kStrings, true}};

std::string wrong(const char* json) {
  try {
    (void)Arguments(kParameters, Json::parse(json)).integer("size", 1, 100, 5);
    return {};
  } catch (const Failure& e) {
    return e.what();
  }
}

TEST(QmpArguments, SayWhatIsWrong) {
  EXPECT_EQ(wrong(R"({})"), "Parameter 'name' is missing");
  EXPECT_EQ(wrong(R"({"name":"x","nam":1})"), "Parameter 'nam' is unexpected");
  EXPECT_EQ(wrong(R"({"name":1})"), "Invalid parameter type for 'name', expected: string");
  EXPECT_EQ(wrong(R"({"name":"x","size":1.5})"),
            "Invalid parameter type for 'size', expected: integer");
  EXPECT_EQ(wrong(R"({"name":"x","on":"on"})"),
            "Invalid parameter type for 'on', expected: boolean");
  EXPECT_EQ(wrong(R"({"name":"x","list":["a",1]})"),
            "Invalid parameter type for 'list', expected: array");
  EXPECT_NE(wrong(R"({"name":"x","mode":"saf"})").find("does not accept value 'saf'"),
            std::string::npos);
  for (const char* size : {"0", "101", "-1", "-9223372036854775808", "18446744073709551615"}) {
    EXPECT_EQ(wrong(("{\"name\":\"x\",\"size\":" + std::string(size) + "}").c_str()),
              "Parameter 'size' is expected to be from 1 to 100")
        << size;
  }
  EXPECT_EQ(wrong(R"({"name":"x","mode":"hard","size":100,"on":true,"list":[]})"), "");
}

}  // namespace
}  // namespace minivmm::control::qmp
