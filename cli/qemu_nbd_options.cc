// SPDX-License-Identifier: Apache-2.0
// qemu-nbd's command line.
#include <string>

#include <cerrno>
#include <charconv>
#include <cstdio>
#include <initializer_list>

#include <fmt/core.h>
#include <getopt.h>

#include "base/error.h"
#include "block/crypto/object.h"
#include "cli/command.h"
#include "cli/image_arguments.h"
#include "cli/image_personality.h"
#include "cli/qemu_nbd.h"

namespace minivmm::cli {

using base::Error;

namespace {

// What the protocol carries of a name or a description.
constexpr size_t kMostText = 4096;

enum Long : int {
  kCache = 256,
  kAio,
  kDiscard,
  kDetectZeroes,
  kImageOpts,
  kFork,
  kPidFile,
  kTlsCreds,
  kTlsAuthz,
  kTlsHostname,
  kSelinux,
  kObject
};

constexpr option kOptions[] = {
    {"help", no_argument, nullptr, 'h'},
    {"version", no_argument, nullptr, 'V'},
    {"bind", required_argument, nullptr, 'b'},
    {"port", required_argument, nullptr, 'p'},
    {"socket", required_argument, nullptr, 'k'},
    {"offset", required_argument, nullptr, 'o'},
    {"read-only", no_argument, nullptr, 'r'},
    {"snapshot", no_argument, nullptr, 's'},
    {"load-snapshot", required_argument, nullptr, 'l'},
    {"nocache", no_argument, nullptr, 'n'},
    {"cache", required_argument, nullptr, kCache},
    {"aio", required_argument, nullptr, kAio},
    {"discard", required_argument, nullptr, kDiscard},
    {"detect-zeroes", required_argument, nullptr, kDetectZeroes},
    {"shared", required_argument, nullptr, 'e'},
    {"format", required_argument, nullptr, 'f'},
    {"allocation-depth", no_argument, nullptr, 'A'},
    {"bitmap", required_argument, nullptr, 'B'},
    {"persistent", no_argument, nullptr, 't'},
    {"verbose", no_argument, nullptr, 'v'},
    {"export-name", required_argument, nullptr, 'x'},
    {"description", required_argument, nullptr, 'D'},
    {"list", no_argument, nullptr, 'L'},
    {"connect", required_argument, nullptr, 'c'},
    {"disconnect", no_argument, nullptr, 'd'},
    {"object", required_argument, nullptr, kObject},
    {"tls-creds", required_argument, nullptr, kTlsCreds},
    {"tls-authz", required_argument, nullptr, kTlsAuthz},
    {"tls-hostname", required_argument, nullptr, kTlsHostname},
    {"trace", required_argument, nullptr, 'T'},
    {"selinux-label", required_argument, nullptr, kSelinux},
    {"image-opts", no_argument, nullptr, kImageOpts},
    {"fork", no_argument, nullptr, kFork},
    {"pid-file", required_argument, nullptr, kPidFile},
    {nullptr, 0, nullptr, 0},
};

constexpr const char* kHelp =
    "Usage: qemu-nbd [OPTIONS] FILE\n"
    "  or:  qemu-nbd -L [OPTIONS]\n"
    "Serves a disk image over NBD, as QEMU's program of this name does (minivmm {}).\n\n"
    "  -p PORT, -b ADDRESS, -k PATH    where to listen: TCP, or a unix socket\n"
    "  -f FORMAT, --image-opts         the image's format; FILE is a set of options\n"
    "  -r, -s, -l SNAPSHOT             read-only; writes are thrown away; a snapshot in the image\n"
    "  -o OFFSET                       the disk begins there\n"
    "  -x NAME, -D TEXT                the export's name and description\n"
    "  -e N, -t                        clients at once (1; 0: any); stay when the last one leaves\n"
    "  -n, --cache=MODE                none, writeback, writethrough, directsync, unsafe\n"
    "  --discard=ignore|unmap, --detect-zeroes=off|on|unmap\n"
    "                                  what becomes of discarded ranges and of zeroes\n"
    "  --aio=MODE                      accepted: io_uring is used where there is one\n"
    "  -A, -B BITMAP                   tell the allocation depth; a dirty bitmap (may be "
    "repeated)\n"
    "  --object, --tls-creds=ID, --tls-authz=ID, --tls-hostname=NAME     TLS\n"
    "  --fork, --pid-file=PATH, -v     run in the background; the process id; say more\n"
    "  -T TEXT                         accepted: there are no trace events\n"
    "  -c /dev/nbdN, -d /dev/nbdN      make FILE a block device of this machine; end it\n"
    "  -L                              list a server's exports\n";

class Parser {
 public:
  explicit Parser(QemuNbdRequest& out) : out_(out) {}

  // False: it was all said.
  bool take(int option, const std::string& value);
  // What excludes what, in QEMU's order.
  void check(int names) const;

 private:
  void take_once(bool& seen, const char* what) const {
    if (seen) throw Error(EINVAL, fmt::format("{} can only be specified once", what));
    seen = true;
  }
  void take_cache(const std::string& value);
  void take_image(int option, const std::string& value);
  void take_policy(int option, const std::string& value);
  bool take_rest(int option, const std::string& value);
  void check_tls() const;

  QemuNbdRequest& out_;
  bool seen_cache_ = false, seen_aio_ = false, seen_discard_ = false;
  bool seen_offset_ = false, seen_description_ = false, seen_name_ = false, seen_selinux_ = false;
};

template <typename T>
T parse_as(const std::string& text, const char* what) {
  T out = 0;
  const char* const end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, out);
  if (parsed.ec == std::errc() && parsed.ptr == end) return out;
  throw Error(EINVAL, fmt::format("Invalid {} '{}'", what, text));
}

bool is_one_of(const std::string& text, std::initializer_list<std::string_view> words) {
  for (const std::string_view word : words) {
    if (text == word) return true;
  }
  return false;
}

std::string short_text(const char* what, const std::string& text) {
  if (text.size() > kMostText) {
    throw Error(EINVAL, fmt::format("export {} '{}' too long", what, printable(text)));
  }
  return text;
}

void Parser::take_cache(const std::string& value) {
  take_once(seen_cache_, "-n and --cache");
  if (!is_one_of(value, {"none", "off", "writeback", "writethrough", "directsync", "unsafe"})) {
    throw Error(EINVAL, fmt::format("Invalid cache mode `{}'", value));
  }
  out_.cache = value == "off" ? "none" : value;
}

// How the image is used.
void Parser::take_policy(int option, const std::string& value) {
  switch (option) {
    case 'n':
      return take_cache("none");
    case kCache:
      return take_cache(value);
    case kAio:
      take_once(seen_aio_, "--aio");
      if (!is_one_of(value, {"native", "io_uring", "threads"})) {
        throw Error(EINVAL, fmt::format("Invalid aio mode '{}'", value));
      }
      out_.aio = value;
      return;
    case kDiscard:
      take_once(seen_discard_, "--discard");
      if (!is_one_of(value, {"ignore", "off", "unmap", "on"})) {
        throw Error(EINVAL, fmt::format("Invalid discard mode `{}'", value));
      }
      out_.discard = is_one_of(value, {"unmap", "on"});
      return;
    default:
      if (!is_one_of(value, {"off", "on", "unmap"})) {
        throw Error(EINVAL, fmt::format("Failed to parse detect_zeroes mode: invalid parameter "
                                        "value: {}",
                                        value));
      }
      out_.detect_zeroes = value;
  }
}

// Which image, and which part of it.
void Parser::take_image(int option, const std::string& value) {
  switch (option) {
    case 'o':
      out_.offset = parse_as<uint64_t>(value, "offset");
      seen_offset_ = true;
      return;
    case 'r':
      out_.read_only = true;
      return;
    case 's':
      out_.temporary = true;
      return;
    case 'l':
      out_.snapshot = value;
      out_.read_only = true;
      return;
    case 'f':
      out_.format = value;
      return;
    case 'B':
      out_.bitmaps.push_back(value);
      return;
    case 'A':
      out_.allocation_depth = true;
      return;
    default:
      out_.image_opts = true;
  }
}

bool Parser::take(int option, const std::string& value) {
  switch (option) {
    case 'n':
    case kCache:
    case kAio:
    case kDiscard:
    case kDetectZeroes:
      take_policy(option, value);
      return true;
    case 'o':
    case 'r':
    case 's':
    case 'l':
    case 'f':
    case 'A':
    case 'B':
    case kImageOpts:
      take_image(option, value);
      return true;
    case 'b':
      out_.bind = value;
      out_.bind_given = true;
      return true;
    case 'p':
      out_.port = parse_as<uint16_t>(value, "port");
      return true;
    case 'k':
      if (!value.starts_with('/')) throw Error(EINVAL, "socket path must be absolute");
      out_.socket = value;
      return true;
    case 'e':
      out_.shared = parse_as<unsigned>(value, "shared device number");
      return true;
    case 'x':
      out_.name = short_text("name", value);
      seen_name_ = true;
      return true;
    case 'D':
      out_.description = short_text("description", value);
      seen_description_ = true;
      return true;
    default:
      return take_rest(option, value);
  }
}

bool Parser::take_rest(int option, const std::string& value) {
  switch (option) {
    case 't':
      out_.persistent = true;
      return true;
    case 'v':
      out_.verbose = true;
      return true;
    case 'L':
      out_.list = true;
      return true;
    case 'c':
      out_.device = value;
      return true;
    case 'd':
      out_.disconnect = true;
      return true;
    case 'T':
      if (value == "help" || value == "?") return false;
      print_warning(fmt::format("there are no trace events: -T {} is ignored", printable(value)));
      return true;
    case kObject:
      block::crypto::add_object(value);
      return true;
    case kTlsCreds:
      out_.tls_creds = value;
      return true;
    case kTlsAuthz:
      out_.tls_authz = value;
      return true;
    case kTlsHostname:
      out_.tls_hostname = value;
      return true;
    case kSelinux:
      seen_selinux_ = true;
      return true;
    case kFork:
      out_.fork = true;
      return true;
    case kPidFile:
      out_.pid_file = value;
      return true;
    case 'V':
      fmt::print("qemu-nbd 7.2.0 (minivmm {})\n", MINIVMM_VERSION);
      return false;
    default:
      fmt::print(kHelp, MINIVMM_VERSION);
      return false;
  }
}

void Parser::check_tls() const {
  if (out_.tls_creds.empty()) {
    for (const auto& [text, name] : {std::pair(&out_.tls_authz, "--tls-authz"),
                                     std::pair(&out_.tls_hostname, "--tls-hostname")}) {
      if (text->empty()) continue;
      throw Error(EINVAL, fmt::format("{} is not permitted without --tls-creds", name));
    }
    return;
  }
  if (!out_.device.empty()) throw Error(EINVAL, "TLS is not supported with a host device");
  if (!out_.tls_authz.empty() && out_.list) {
    throw Error(EINVAL, "TLS authorization is incompatible with export list");
  }
  if (!out_.tls_hostname.empty() && !out_.list) {
    throw Error(EINVAL, "TLS hostname is only supported with export list");
  }
}

void Parser::check(int names) const {
  if (out_.detect_zeroes == "unmap" && !out_.discard) {
    throw Error(EINVAL,
                "setting detect-zeroes to unmap is not allowed without setting discard operation "
                "to unmap");
  }
  if (out_.list) {
    if (names != 0) throw Error(EINVAL, "List mode is incompatible with a file name");
    const bool device = seen_name_ || seen_description_ || seen_offset_ || !out_.device.empty() ||
                        out_.disconnect || !out_.format.empty() || !out_.snapshot.empty() ||
                        !out_.bitmaps.empty() || out_.allocation_depth || seen_aio_ ||
                        seen_discard_ || seen_cache_;
    if (device) throw Error(EINVAL, "List mode is incompatible with per-device settings");
    if (out_.fork) throw Error(EINVAL, "List mode is incompatible with forking");
  } else if (names != 1) {
    throw UsageError{"Invalid number of arguments"};
  }
  check_tls();
  if (!seen_selinux_) return;
  if (out_.socket.empty() && out_.device.empty()) {
    throw Error(EINVAL, "--selinux-label is not permitted without --socket");
  }
  throw Error(ENOTSUP, "--selinux-label is not supported: give the socket's label with chcon");
}

}  // namespace

bool parse_qemu_nbd(const std::vector<std::string>& arguments, QemuNbdRequest& out, int& status) {
  std::vector<char*> argv;
  std::string program = "qemu-nbd";
  std::vector<std::string> words = arguments;
  argv.push_back(program.data());
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const int count = static_cast<int>(argv.size()) - 1;
  Parser parser(out);
  for (int each = 0; (each = ::getopt_long(count, argv.data(), "hVb:p:k:o:rsl:ne:f:tvx:D:LAB:c:dT:",
                                           kOptions, nullptr)) != -1;) {
    if (each == '?') {  // getopt has said why
      print_error("Try `qemu-nbd --help' for more information.");
      status = 1;
      return false;
    }
    if (parser.take(each, optarg != nullptr ? optarg : "")) continue;
    status = 0;
    return false;
  }
  parser.check(count - optind);
  if (optind < count) out.file = argv[static_cast<size_t>(optind)];
  if (out.disconnect) out.device = out.file;
  return true;
}

}  // namespace minivmm::cli
