// SPDX-License-Identifier: Apache-2.0
// minivmm control
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <sstream>

#include <boost/program_options.hpp>
#include <fmt/core.h>

#include "base/error.h"
#include "cli/command.h"
#include "cli/control_client.h"
#include "cli/control_words.h"
#include "cli/daemon_options.h"
#include "cli/image_personality.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using control::qmp::Json;
using Strings = std::vector<std::string>;

namespace {

constexpr int kRefused = 1;
constexpr int kUnreachable = 2;
constexpr uint64_t kMaxSeconds = 86'400;

constexpr const char* kUsage =
    "Usage: minivmm control [options] SOCKET COMMAND [KEY=VALUE... | JSON]\n"
    "       minivmm control [options] SOCKET < COMMANDS\n"
    "       minivmm control [options] SOCKET --events [EVENT...]\n\n"
    "Asks a running `minivmm boot` or `minivmm serve` by its control socket (--qmp unix:SOCKET) "
    "and\n"
    "prints what it answers as JSON. The protocol is QEMU's QMP, so a socket of QEMU or of\n"
    "qemu-storage-daemon will do, too, and theirs will do for this one.\n\n"
    "A key may be dotted (file.driver=file), a number may end in K, M, G or T. Without a COMMAND\n"
    "commands are read from standard input, one a line. The exit status is 0 if every command was\n"
    "carried out, 1 if one was refused, 2 if the socket cannot be used.\n\n"
    "Examples:\n"
    "  minivmm control m.qmp query-block-exports\n"
    "  minivmm control m.qmp blockdev-add driver=qcow2 node-name=d1 file.driver=file \\\n"
    "      file.filename=d1.qcow2\n"
    "  minivmm control m.qmp block-export-add type=nbd id=e1 node-name=d1 writable=on\n"
    "  minivmm control m.qmp block-export-del id=e1 mode=hard\n"
    "  minivmm control m.qmp block_resize node-name=disk0 size=20G\n"
    "  minivmm control m.qmp blockdev-snapshot-internal-sync device=disk0 name=before-upgrade\n"
    "  minivmm control m.qmp block-dirty-bitmap-add node=disk0 name=b0 persistent=on\n"
    "  minivmm control m.qmp --events BLOCK_IO_ERROR STOP\n\n"
    "Commands:\n";

po::options_description control_options() {
  po::options_description out("Options", 100, 60);
  // clang-format off
  out.add_options()
    ("events", "print events, a line each, until the other side ends; only those named, if any are")
    ("compact", "print answers in one line")
    ("timeout", po::value<std::string>()->default_value("0")->value_name("SECONDS"),
     "how long an answer may take; 0 is for ever")
    ("help,h", "this text");
  // clang-format on
  return out;
}

std::string text_of(const Json& value, bool compact) {
  return value.dump(compact ? -1 : 4, ' ', false, Json::error_handler_t::replace);
}

// False: it was refused.
bool carry_out(ControlClient& client, const Strings& words, bool compact) {
  const Json reply = client.ask(control_message(words));
  if (const auto error = reply.find("error"); error != reply.end()) {
    print_error(error->value("desc", text_of(*error, true)));
    return false;
  }
  fmt::print("{}\n", text_of(reply.value("return", Json()), compact));
  std::fflush(stdout);
  return true;
}

bool carry_out_lines(ControlClient& client, bool compact) {
  const bool asks = ::isatty(STDIN_FILENO) != 0 && ::isatty(STDERR_FILENO) != 0;
  bool good = true;
  for (std::string line;;) {
    if (asks) fmt::print(stderr, "(minivmm) ");
    if (!std::getline(std::cin, line)) break;
    try {
      const Strings words = control_line_words(line);
      if (words.empty() || words[0].starts_with('#')) continue;
      good = carry_out(client, words, compact) && good;
    } catch (const base::Error& e) {
      if (e.err() != EINVAL) throw;
      print_error(e.what());
      good = false;
    }
  }
  return good;
}

void print_events(ControlClient& client, const Strings& names) {
  while (const auto event = client.next_event()) {
    const std::string name = event->value("event", "");
    if (!names.empty() && std::find(names.begin(), names.end(), name) == names.end()) continue;
    fmt::print("{}\n", text_of(*event, true));
    std::fflush(stdout);
  }
}

struct Wanted {
  std::string socket;
  Strings words;
  po::variables_map values;
};

// False: help was asked for.
bool parse_control(const Strings& arguments, Wanted& out) {
  po::options_description all;
  all.add(control_options()).add_options()("word", po::value<Strings>());
  po::positional_options_description positions;
  positions.add("word", -1);
  try {
    const int style = po::command_line_style::unix_style & ~po::command_line_style::allow_guessing;
    po::command_line_parser parser(arguments);
    po::store(parser.options(all).positional(positions).style(style).run(), out.values);
    po::notify(out.values);
  } catch (const po::error& e) {
    throw UsageError{e.what()};
  }
  if (out.values.count("help") != 0) {
    std::ostringstream text;
    text << kUsage << control_command_list() << "\n" << control_options();
    fmt::print("{}", text.str());
    return false;
  }
  if (out.values.count("word") != 0) out.words = out.values["word"].as<Strings>();
  if (out.words.empty()) throw UsageError{"control: the path of a control socket is expected"};
  out.socket = out.words[0];
  constexpr std::string_view kUnix = "unix:";
  if (out.socket.starts_with(kUnix)) out.socket.erase(0, kUnix.size());
  out.words.erase(out.words.begin());
  return true;
}

}  // namespace

int run_control(const Strings& arguments) {
  Wanted wanted;
  if (!parse_control(arguments, wanted)) return 0;
  const bool compact = wanted.values.count("compact") != 0;
  const bool events = wanted.values.count("events") != 0;
  const std::chrono::seconds limit(number_value(wanted.values, "timeout", 0, kMaxSeconds));
  // What is written wrongly is found before anybody is asked.
  if (!events && !wanted.words.empty()) (void)control_message(wanted.words);
  try {
    ControlClient client(wanted.socket, limit);
    if (events) {
      print_events(client, wanted.words);
      return 0;
    }
    const bool good = wanted.words.empty() ? carry_out_lines(client, compact)
                                           : carry_out(client, wanted.words, compact);
    return good ? 0 : kRefused;
  } catch (const base::Error& e) {
    print_error(e.what());
    return kUnreachable;
  }
}

}  // namespace minivmm::cli
