// SPDX-License-Identifier: Apache-2.0
// The program called as qemu-nbd: its options for serving images, turned into a run of the daemon.
#include <fcntl.h>
#include <poll.h>
#include <string>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <vector>

#include <fmt/core.h>
#include <getopt.h>

#include "base/error.h"
#include "base/log.h"
#include "base/nbd_uri.h"
#include "base/unique_fd.h"
#include "block/crypto/object.h"
#include "block/protocols/nbd/survey.h"
#include "cli/command.h"
#include "cli/image_arguments.h"
#include "cli/image_personality.h"
#include "control/daemon.h"
#include "control/readiness.h"
#include "control/specs.h"

namespace minivmm::cli {

using base::Error;
using block::Options;

namespace {

constexpr const char* kNode = "disk";

struct Request {
  std::string file;
  std::string format, cache, snapshot, socket, name, description, pid_file, tls_creds;
  std::string bind = "0.0.0.0";
  bool bind_given = false, port_given = false;
  uint16_t port = base::kNbdPort;
  unsigned shared = 1;
  uint64_t offset = 0;
  bool read_only = false, temporary = false, image_opts = false;
  bool persistent = false, verbose = false, list = false, fork = false;
};

enum Long : int {
  kCache = 256,
  kAio,
  kDiscard,
  kDetectZeroes,
  kImageOpts,
  kFork,
  kPidFile,
  kTlsCreds,
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
    {"object", required_argument, nullptr, kObject},
    {"tls-creds", required_argument, nullptr, kTlsCreds},
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
    "  --aio=, --discard=, --detect-zeroes=off   accepted\n"
    "  -A                              accepted: the allocation depth is always told\n"
    "  --object, --tls-creds=ID        TLS\n"
    "  --fork, --pid-file=PATH, -v     run in the background; the process id; say more\n"
    "  -L                              list a server's exports\n"
    "To attach a device: minivmm nbd connect.\n";

template <typename T>
T parse_as(const std::string& text, const char* what, T min) {
  T out = 0;
  const char* const end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, out);
  if (parsed.ec == std::errc() && parsed.ptr == end && out >= min) return out;
  throw Error(EINVAL, fmt::format("Invalid {} '{}'", what, text));
}

void require_one_of(const char* what, const std::string& text,
                    std::initializer_list<std::string_view> words) {
  for (const std::string_view word : words) {
    if (text == word) return;
  }
  throw Error(EINVAL, fmt::format("Invalid {} mode `{}'", what, text));
}

// False: it was all said.
bool take_option(int option, Request& out) {
  const std::string value = optarg != nullptr ? optarg : "";
  switch (option) {
    case 'b':
      out.bind = value;
      out.bind_given = true;
      break;
    case 'p':
      out.port = parse_as<uint16_t>(value, "port", 1);
      out.port_given = true;
      break;
    case 'k':
      if (value.empty() || value.front() != '/') {
        throw Error(EINVAL, "socket path must be absolute");
      }
      out.socket = value;
      break;
    case 'o':
      out.offset = parse_size_as(value, "offset");
      break;
    case 'r':
      out.read_only = true;
      break;
    case 's':
      out.temporary = true;
      break;
    case 'l':
      out.snapshot = value;
      out.read_only = true;
      break;
    case 'n':
      out.cache = "none";
      break;
    case 'e':
      out.shared = parse_as<unsigned>(value, "shared device number", 0);
      break;
    case 'f':
      out.format = value;
      break;
    case 't':
      out.persistent = true;
      break;
    case 'v':
      out.verbose = true;
      break;
    case 'x':
      out.name = value;
      break;
    case 'D':
      out.description = value;
      break;
    case 'L':
      out.list = true;
      break;
    case 'A':
      break;
    case 'B':
      throw Error(ENOTSUP, "-B: exports of bitmaps are a matter of `minivmm serve --export`");
    case kCache:
      require_one_of("cache", value,
                     {"none", "off", "writeback", "writethrough", "directsync", "unsafe"});
      out.cache = value == "off" ? "none" : value;
      break;
    case kAio:
      require_one_of("aio", value, {"native", "io_uring", "threads"});
      break;
    case kDiscard:
      require_one_of("discard", value, {"ignore", "off", "unmap", "on"});
      break;
    case kDetectZeroes:
      require_one_of("detect-zeroes", value, {"off"});
      break;
    case kObject:
      block::crypto::add_object(value);
      break;
    case kTlsCreds:
      out.tls_creds = value;
      break;
    case kImageOpts:
      out.image_opts = true;
      break;
    case kFork:
      out.fork = true;
      break;
    case kPidFile:
      out.pid_file = value;
      break;
    case 'h':
      fmt::print(kHelp, MINIVMM_VERSION);
      return false;
    case 'V':
      fmt::print("qemu-nbd 7.2.0 (minivmm {})\n", MINIVMM_VERSION);
      return false;
    default:
      throw UsageError{"Invalid option"};
  }
  return true;
}

base::NbdUri address_of(const Request& wanted) {
  base::NbdUri out;
  if (!wanted.socket.empty()) {
    if (wanted.bind_given || wanted.port_given) {
      throw Error(EINVAL, "-k and -p/-b don't go together");
    }
    out.socket_path = wanted.socket;
    return out;
  }
  out.host = wanted.bind;
  out.port = wanted.port;
  return out;
}

// "0xced ( flush fua trim zeroes df cache fast-zero )"
std::string flags_text(const block::NbdExportSurvey& e) {
  constexpr struct {
    std::string_view ability;
    unsigned bit;
    const char* name;
  } kFlags[] = {
      {"is_read_only", 1, "readonly"},
      {"can_flush", 2, "flush"},
      {"can_fua", 3, "fua"},
      {"is_rotational", 4, "rotational"},
      {"can_trim", 5, "trim"},
      {"can_zero", 6, "zeroes"},
      {"can_df", 7, "df"},
      {"can_multi_conn", 8, "multi"},
      {"can_cache", 10, "cache"},
      {"can_fast_zero", 11, "fast-zero"},
  };
  unsigned flags = 1;
  std::string names;
  for (const auto& flag : kFlags) {
    for (const auto& [ability, value] : e.abilities) {
      if (flag.ability != ability || !value) continue;
      flags |= 1U << flag.bit;
      names += fmt::format("{} ", flag.name);
    }
  }
  return fmt::format("{:#x} ( {})", flags, names);
}

// As QEMU prints it.
int list_exports(const Request& wanted) {
  base::NbdUri uri = address_of(wanted);
  if (!wanted.bind_given && !uri.is_unix()) uri.host = "localhost";
  if (!wanted.tls_creds.empty()) {
    throw Error(ENOTSUP, "-L with TLS: use `minivmm nbd list nbds://...`");
  }
  const block::NbdServerSurvey server = block::survey_nbd_server(uri, /*all=*/true);
  fmt::print("exports available: {}\n", server.exports.size());
  for (const block::NbdExportSurvey& e : server.exports) {
    fmt::print(" export: '{}'\n", printable(e.name));
    if (!e.description.empty()) fmt::print("  description: {}\n", printable(e.description));
    fmt::print("  size:  {}\n  flags: {}\n", e.size, flags_text(e));
    if (e.minimum_block != 0) {
      fmt::print("  min block: {}\n  opt block: {}\n  max block: {}\n", e.minimum_block,
                 e.preferred_block, e.maximum_block);
    }
    if (!e.contexts.empty()) fmt::print("  available meta contexts: {}\n", e.contexts.size());
    for (const std::string& context : e.contexts) fmt::print("   {}\n", printable(context));
  }
  return 0;
}

std::string doubled_commas(const std::string& text) {
  std::string out;
  for (const char c : text) out.append(c == ',' ? 2 : 1, c);
  return out;
}

// "NAME", or "snapshot.id=ID,snapshot.name=NAME".
void choose_snapshot(Options& node, const std::string& text) {
  if (text.find("snapshot.") != 0) return node.set("snapshot", text);
  Options given = Options::from_keys(text);
  if (auto id = given.take_string("snapshot.id")) node.set("snapshot-id", *id);
  if (auto name = given.take_string("snapshot.name")) node.set("snapshot-name", *name);
  given.finish("-l");
}

control::Disk disk_of(const Request& wanted) {
  std::string text = wanted.image_opts ? wanted.file : doubled_commas(wanted.file);
  if (wanted.image_opts) {
    if (!wanted.format.empty()) {
      throw Error(EINVAL, "--image-opts and -f are mutually exclusive");
    }
    if (wanted.read_only) text += ",read-only=on";
  } else {
    if (!wanted.format.empty()) text += ",format=" + wanted.format;
    if (!wanted.cache.empty()) text += ",cache=" + wanted.cache;
    if (wanted.read_only) text += ",ro=on";
  }
  if (wanted.temporary) text += ",snapshot=on";
  control::Disk out = control::parse_disk(text + ",id=" + kNode, 0);
  if (!wanted.snapshot.empty()) choose_snapshot(out.node, wanted.snapshot);
  if (wanted.offset != 0) {
    Options inner = std::move(out.node);
    (void)inner.take_string("node-name");
    Options outer;
    outer.set("driver", "raw");
    outer.set("node-name", kNode);
    outer.set("offset", std::to_string(wanted.offset));
    if (inner.peek("read-only") == "on") outer.set("read-only", "on");
    outer.set_child("file", std::move(inner));
    out.node = std::move(outer);
  }
  return out;
}

control::Config config_of(const Request& wanted) {
  control::Config config;
  // As QEMU has it: an image's recorded backing file is opened wherever it lies.
  config.open_policy.backing_roots = {"/"};
  config.disks.push_back(disk_of(wanted));
  control::Export exported;
  exported.node_name = kNode;
  exported.name = wanted.name;
  exported.description = wanted.description;
  exported.writable = !wanted.read_only && !config.disks[0].read_only;
  exported.nbd = true;
  config.exports.push_back(std::move(exported));
  const std::vector<int> inherited = control::inherited_sockets();
  if (!inherited.empty() && (!wanted.socket.empty() || wanted.bind_given || wanted.port_given)) {
    throw Error(EINVAL, "Socket activation and -k, -p or -b don't go together");
  }
  for (const int fd : inherited) config.nbd.push_back({.uri = {}, .fd = fd});
  if (inherited.empty()) {
    const std::string tls =
        wanted.tls_creds.empty() ? "" : ",tls-creds=" + doubled_commas(wanted.tls_creds);
    config.nbd.push_back(control::parse_nbd(doubled_commas(address_of(wanted).text()) + tls));
  }
  config.nbd_allow_remote = true;
  config.nbd_clients = wanted.shared;
  config.once = !wanted.persistent;
  config.pid_file = wanted.pid_file;
  return config;
}

// What the child writes to its standard error is passed on until it serves; then it is alone.
int wait_for_child(pid_t child, int ready, int errors) {
  bool serves = false;
  pollfd fds[] = {{ready, POLLIN, 0}, {errors, POLLIN, 0}};
  while (fds[1].fd >= 0) {
    if (::poll(fds, 2, serves ? 0 : -1) <= 0) break;
    char text[512];
    if (fds[1].revents != 0) {
      const ssize_t n = ::read(errors, text, sizeof text);
      if (n > 0 && ::write(STDERR_FILENO, text, static_cast<size_t>(n)) < 0) break;
      if (n <= 0) fds[1].fd = -1;
    }
    if (fds[0].revents != 0) {
      serves = ::read(ready, text, sizeof text) > 0;
      fds[0].fd = -1;
    }
  }
  if (serves) return 0;
  int status = 0;
  ::waitpid(child, &status, 0);
  return 1;
}

int run_forked(control::Config config) {
  int ready[2];
  int errors[2];
  if (::pipe2(ready, O_CLOEXEC) != 0 || ::pipe2(errors, O_CLOEXEC) != 0) {
    throw base::errno_error(errno, "--fork");
  }
  const pid_t child = ::fork();
  if (child < 0) throw base::errno_error(errno, "--fork");
  if (child > 0) {
    ::close(ready[1]);
    ::close(errors[1]);
    return wait_for_child(child, ready[0], errors[0]);
  }
  ::close(ready[0]);
  ::close(errors[0]);
  ::setsid();
  const base::UniqueFd nothing(::open("/dev/null", O_RDWR | O_CLOEXEC));
  ::dup2(nothing.get(), STDIN_FILENO);
  ::dup2(nothing.get(), STDOUT_FILENO);
  ::dup2(errors[1], STDERR_FILENO);
  ::close(errors[1]);
  config.ready_fd = ready[1];
  return control::Daemon(std::move(config)).run();
}

}  // namespace

int run_qemu_nbd(const std::vector<std::string>& arguments) {
  Request wanted;
  std::vector<char*> argv;
  std::string program = "qemu-nbd";
  std::vector<std::string> words = arguments;
  argv.push_back(program.data());
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const int count = static_cast<int>(argv.size()) - 1;
  for (int each = 0; (each = ::getopt_long(count, argv.data(), "hVb:p:k:o:rsl:ne:f:tvx:D:LAB:",
                                           kOptions, nullptr)) != -1;) {
    if (each == '?') return 1;  // getopt has said why
    if (!take_option(each, wanted)) return 0;
  }
  base::set_log_level(wanted.verbose ? base::LogLevel::kDebug : base::LogLevel::kWarning);
  if (wanted.list) {
    if (optind != count) throw UsageError{"List mode is incompatible with a file name"};
    return list_exports(wanted);
  }
  if (count - optind != 1) throw UsageError{"Invalid number of arguments"};
  wanted.file = argv[static_cast<size_t>(optind)];
  control::Config config = config_of(wanted);
  if (wanted.fork) return run_forked(std::move(config));
  return control::Daemon(std::move(config)).run();
}

}  // namespace minivmm::cli
