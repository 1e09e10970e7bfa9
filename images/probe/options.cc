// SPDX-License-Identifier: Apache-2.0
#include "options.h"

#include "text.h"

namespace minivmm::probe {
namespace {

bool parse_seconds(StringView text, uint64_t* hundredths) {
  const size_t dot = text.find('.');
  uint64_t whole = 0;
  uint64_t part = 0;
  if (!parse_number(StringView(text.data(), dot == StringView::npos ? text.size() : dot), &whole) ||
      whole > 1000000) {
    return false;
  }
  if (dot != StringView::npos) {
    const StringView rest(text.data() + dot + 1, text.size() - dot - 1);
    if (rest.empty() || rest.size() > 2 || !parse_number(rest, &part)) return false;
    if (rest.size() == 1) part *= 10;
  }
  *hundredths = whole * 100 + part;
  return true;
}

bool parse_pattern(StringView text, Options* out) {
  uint64_t value = 0;
  if (text == "stamp") {
    out->pattern = PatternKind::kStamp;
  } else if (text == "random") {
    out->pattern = PatternKind::kRandom;
  } else if (text == "zero") {
    out->pattern = PatternKind::kByte;
    out->byte = 0;
  } else if (parse_number(text, &value) && value <= 255) {
    out->pattern = PatternKind::kByte;
    out->byte = static_cast<uint8_t>(value);
  } else {
    return false;
  }
  return true;
}

bool parse_switch(StringView text, bool* out) {
  *out = text == "on";
  return text == "on" || text == "off";
}

struct NumberOption {
  StringView key;
  uint64_t Options::*member;
};
constexpr NumberOption kNumbers[] = {
    {"disk", &Options::disk},
    {"offset", &Options::offset},
    {"length", &Options::length},
    {"bs", &Options::bs},
    {"depth", &Options::depth},
    {"segments", &Options::segments},
    {"seed", &Options::seed},
    {"count", &Options::count},
    {"first", &Options::first},
    {"writer", &Options::writer},
    {"max_blocks", &Options::max_blocks},
};

struct FlagOption {
  StringView key;
  bool Options::*member;
};
constexpr FlagOption kFlags[] = {
    {"sum", &Options::sum},       {"dump", &Options::dump},
    {"force", &Options::force},   {"unmap", &Options::unmap},
    {"shared", &Options::shared}, {"log", &Options::log},
    {"zeroes", &Options::zeroes}, {"discards", &Options::discards},
    {"echo", &Options::echo},     {"indirect", &Options::indirect},
    {"poll", &Options::poll},     {"tolerate", &Options::tolerate},
};

bool parse_value(StringView key, StringView value, Options* out) {
  for (const auto& option : kNumbers) {
    if (key == option.key) {
      if (key == "bs") out->bs_given = true;
      return parse_number(value, &(out->*option.member));
    }
  }
  for (const auto& option : kFlags) {
    if (key == option.key) return parse_switch(value, &(out->*option.member));
  }
  if (key == "seconds") return parse_seconds(value, &out->seconds_hundredths);
  if (key == "pattern") return parse_pattern(value, out);
  if (key == "rw") {
    out->rw = value;
    return true;
  }
  if (key == "mode") {
    out->poll = value == "poll";
    return value == "poll" || value == "irq";
  }
  if (key == "queue") {
    uint64_t queue = 0;
    if (!parse_number(value, &queue) || queue > 1000) return false;
    out->queue = static_cast<int>(queue);
    return true;
  }
  return false;
}

bool parse_flag(StringView word, Options* out) {
  for (const auto& option : kFlags) {
    if (word == option.key) {
      out->*option.member = true;
      return true;
    }
  }
  return false;
}

// Values that need no name: the pattern of write and verify, seed and seconds of stress, ...
bool parse_positional(unsigned index, StringView word, Options* out) {
  if ((out->name == "write" || out->name == "verify") && index == 0) {
    return parse_pattern(word, out);
  }
  if (out->name == "stress" && index == 0) return parse_number(word, &out->seed);
  if (out->name == "stress" && index == 1) return parse_seconds(word, &out->seconds_hundredths);
  if (out->name == "idle" && index == 0) return parse_seconds(word, &out->seconds_hundredths);
  if (out->name == "wce" && index == 0) return parse_switch(word, &out->on);
  if (out->name == "exit" && index == 0) {
    out->status_given = true;
    return parse_number(word, &out->status) && out->status <= 255;
  }
  if (out->name == "bench" && index == 0) {
    out->rw = word;
    return true;
  }
  return false;
}

}  // namespace

StringView parse_job(StringView job, StringView separators, Options* out, StringView* word) {
  *out = Options();
  out->name = next_word(job, separators);
  if (out->name == "bench" || out->name == "stress") out->bs = 4096;
  if (out->name == "bench") out->depth = 32;
  unsigned positional = 0;
  while (true) {
    while (!job.empty() && separators.find(job.front()) != StringView::npos) {
      job.remove_prefix(1);
    }
    // Text may hold anything, so it takes the rest.
    constexpr StringView kText = "text=";
    if (job.starts_with(kText)) {
      job.remove_prefix(kText.size());
      out->pattern = PatternKind::kText;
      out->text = job;
      return {};
    }
    *word = next_word(job, separators);
    if (word->empty()) return {};
    const size_t equals = word->find('=');
    if (equals == StringView::npos) {
      if (parse_flag(*word, out)) continue;
      if (!parse_positional(positional++, *word, out)) return "not understood";
      continue;
    }
    const StringView key(word->data(), equals);
    const StringView value(word->data() + equals + 1, word->size() - equals - 1);
    if (!parse_value(key, value, out)) return "not understood";
  }
}

}  // namespace minivmm::probe
