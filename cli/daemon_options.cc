// SPDX-License-Identifier: Apache-2.0
#include "cli/daemon_options.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <climits>
#include <set>
#include <sstream>
#include <thread>

#include <fmt/core.h>

#include "base/error.h"
#include "base/log.h"
#include "block/crypto/object.h"
#include "cli/command.h"
#include "control/readiness.h"
#include "control/specs.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using Strings = std::vector<std::string>;

namespace {

constexpr uint64_t kMaxShutdownSeconds = 86'400;
// Where arguments that belong to no option are kept, to be refused by name.
constexpr const char* kStray = "stray-argument";

}  // namespace

po::options_description graph_options() {
  po::options_description out("Disks and nodes", 100, 60);
  // clang-format off
  out.add_options()
    ("disk", po::value<Strings>()->composing()->value_name("PATH[,KEY=VALUE...]"),
     "a disk image; makes a node and, for boot, the guest's device. Keys: id=NAME, "
     "format=qcow2|raw|luks, ro, cache=writeback|writethrough|none|directsync|unsafe, backing=FILE, "
     "backing_fmt=FORMAT, offset=, size= (raw), serial=, logical_block_size=, "
     "physical_block_size=, num-queues=, queue-size=, indirect_desc=on|off, event_idx=on|off, media=disk|cdrom, snapshot, legacy, "
     "rerror=report|ignore|stop, werror=report|ignore|stop|enospc, cache-size=, l2-cache-size=, "
     "refcount-cache-size=, l2-cache-entry-size=, locking=auto|on|off, key-secret=ID, "
     "unlock-time= (luks), encrypt.key-secret=ID (qcow2). "
     "A comma inside a value is doubled.")
    ("blockdev", po::value<Strings>()->composing()->value_name("KEYS|JSON"),
     "a node by QEMU's options: driver=...,node-name=...,file.driver=...; or a JSON object")
    ("object", po::value<Strings>()->composing()->value_name("TYPE,id=ID,..."),
     "a password or key that nodes name by its id (key-secret=ID): file=PATH or data=TEXT, "
     "format=raw|base64; encrypted with another: keyid=ID,iv=BASE64. Or tls-creds-x509, "
     "tls-creds-psk: endpoint=server|client, dir=DIR")
    ("backing-root", po::value<Strings>()->composing()->value_name("DIR"),
     "where backing files that images name may lie, besides the image's own directory");
  // clang-format on
  return out;
}

po::options_description front_end_options() {
  po::options_description out("Front ends", 100, 60);
  // clang-format off
  out.add_options()
    ("nbd", po::value<Strings>()->composing()->value_name("URI"),
     "listen for NBD clients: nbd://127.0.0.1[:PORT], nbd+unix:///?socket=PATH, "
     "nbd+vsock://CID[:PORT], fd:N, systemd for the sockets that a service manager hands over, or "
     "stdio for the one client that standard input is. Keys behind it: tls-creds=ID, "
     "tls=required|optional, handshake-timeout=, idle-timeout=, max-connections=, "
     "max-per-client=")
    ("nbd-allow-remote", "let --nbd listen beyond loopback: whoever reaches it can read")
    ("fuse", po::value<Strings>()->composing()->value_name("DIR[,KEY=VALUE...]"),
     "mount a directory with a file for each export. Keys: mode=0600, uid=, gid=, allow_other")
    ("export", po::value<Strings>()->composing()->value_name("NODE[,KEY=VALUE...]"),
     "publish a node, read-only unless writable. Keys: name=, description=, writable, "
     "allow=CLIENT (TLS names, ';' between them), max-connections=, in-flight=, nbd, fuse "
     "(only through those named; all otherwise); clone=memory|qcow2 (each NBD client writes to a "
     "disk of its own), clone-limit=SIZE, clone-total=SIZE, clone-dir=DIR (kept for clients that "
     "ask for NAME/CLIENT)");
  // clang-format on
  return out;
}

namespace {

unsigned default_io_threads() { return std::clamp(std::thread::hardware_concurrency(), 1U, 4U); }

}  // namespace

po::options_description process_options() {
  po::options_description out("Process", 100, 60);
  // clang-format off
  out.add_options()
    ("io-threads",
     po::value<std::string>()->default_value(std::to_string(default_io_threads()))->value_name("N"),
     "event loops, each on a thread; as many as processors, up to 4, if not said")
    ("io-backend", po::value<std::string>()->default_value("auto")->value_name("NAME"),
     "auto, io_uring or epoll")
    ("no-seccomp", "no filters of system calls for the threads that serve guests and clients")
    ("qmp", po::value<std::string>()->value_name("unix:PATH"),
     "a control socket that speaks QMP: nodes, exports, sizes, snapshots and bitmaps can be changed "
     "while they are used")
    ("ready-fd", po::value<std::string>()->value_name("N"),
     "write READY to this descriptor once everything can be used")
    ("pid-file", po::value<std::string>()->value_name("PATH"), "write the process id there")
    ("shutdown-timeout", po::value<std::string>()->default_value("10")->value_name("SECONDS"),
     "how long an end may take before it is forced; a second SIGINT forces it at once")
    ("log-level", po::value<std::string>()->default_value("info")->value_name("LEVEL"),
     "debug, info, warning, error or off")
    ("help,h", "this text");
  // clang-format on
  return out;
}

bool parse(const Strings& arguments, const std::string& usage,
           const po::options_description& options, po::variables_map& values) {
  try {
    // No guessing of abbreviated options: a script must mean what it says.
    const int style = po::command_line_style::unix_style & ~po::command_line_style::allow_guessing;
    po::options_description all;
    all.add(options).add_options()(kStray, po::value<Strings>());
    po::positional_options_description strays;
    strays.add(kStray, -1);
    po::command_line_parser parser(arguments);
    po::store(parser.options(all).positional(strays).style(style).run(), values);
    if (values.count(kStray) != 0) {
      throw UsageError{fmt::format("unexpected argument '{}'", values[kStray].as<Strings>()[0])};
    }
    if (values.count("help") != 0) {
      std::ostringstream text;
      text << usage << options;
      fmt::print("{}", text.str());
      return false;
    }
    po::notify(values);
  } catch (const po::error& e) {
    throw UsageError{e.what()};
  }
  return true;
}

namespace {

Strings list(const po::variables_map& values, const char* name) {
  return values.count(name) != 0 ? values[name].as<Strings>() : Strings();
}

void set_log_level(const std::string& name) {
  struct Level {
    const char* name;
    base::LogLevel level;
  };
  for (const Level& l :
       {Level{"debug", base::LogLevel::kDebug}, Level{"info", base::LogLevel::kInfo},
        Level{"warning", base::LogLevel::kWarning}, Level{"error", base::LogLevel::kError},
        Level{"off", base::LogLevel::kOff}}) {
    if (name == l.name) {
      base::set_log_level(l.level);
      return;
    }
  }
  throw UsageError{fmt::format("--log-level {}: debug, info, warning, error or off", name)};
}

base::BackendChoice backend_choice(const std::string& name) {
  if (name == "auto") return base::BackendChoice::kAuto;
  if (name == "io_uring") return base::BackendChoice::kUring;
  if (name == "epoll") return base::BackendChoice::kEpoll;
  throw UsageError{fmt::format("--io-backend {}: auto, io_uring or epoll", name)};
}

// Descriptors that the command line names, each for one purpose: two owners would close it twice.
class GivenFds {
 public:
  void take(const std::string& option, int fd) {
    if (!taken_.insert(fd).second) {
      throw base::Error(EINVAL, fmt::format("{}: descriptor {} is given twice", option, fd));
    }
    control::take_given_fd(option, fd);
  }

 private:
  std::set<int> taken_;
};

void add_listeners(control::Config& config, const Strings& wanted, GivenFds& given) {
  for (const std::string& text : wanted) {
    if (text != "systemd") {
      config.nbd.push_back(control::parse_nbd(text));
      const int fd = config.nbd.back().fd;
      if (fd >= 0) given.take("--nbd " + text, fd);
      continue;
    }
    const std::vector<int> inherited = control::inherited_sockets();
    if (inherited.empty()) {
      throw base::Error(EINVAL, "--nbd systemd: no sockets were handed over (LISTEN_FDS)");
    }
    for (const int fd : inherited) {
      given.take("--nbd systemd", fd);
      config.nbd.push_back({.uri = {}, .fd = fd});
    }
  }
}

// An export that nothing would publish is a mistake, not a wish.
void check_exports(const control::Config& config) {
  for (const control::Export& wanted : config.exports) {
    const bool published =
        (wanted.nbd && !config.nbd.empty()) || (wanted.fuse && !config.fuse.empty());
    if (!published) {
      throw base::Error(EINVAL, fmt::format("--export {}: no front end to publish it through; add "
                                            "--nbd URI or --fuse DIR",
                                            wanted.node_name));
    }
    // Named ones must all be there.
    if (!wanted.every_front_end &&
        ((wanted.nbd && config.nbd.empty()) || (wanted.fuse && config.fuse.empty()))) {
      throw base::Error(
          EINVAL, fmt::format("--export {} names a front end that is not open: add {}",
                              wanted.node_name, config.nbd.empty() ? "--nbd URI" : "--fuse DIR"));
    }
  }
  if (config.exports.empty() && config.control_socket.empty() &&
      !(config.nbd.empty() && config.fuse.empty())) {
    throw base::Error(EINVAL, "--nbd and --fuse publish what --export names: add --export NODE");
  }
}

// "unix:PATH", with what QEMU's users write behind it and means the same here.
std::string socket_path(const std::string& text) {
  constexpr std::string_view kUnix = "unix:";
  std::string path = text.substr(0, text.find(','));
  const std::string rest = text.substr(path.size());
  const bool known = rest.empty() || rest == ",server" || rest == ",server=on" ||
                     rest == ",server,nowait" || rest == ",server=on,wait=off";
  if (!known || !path.starts_with(kUnix) || path.size() == kUnix.size()) {
    throw base::Error(EINVAL, fmt::format("--qmp {}: unix:PATH is expected; there is no other kind "
                                          "of control socket, because who reaches it can do "
                                          "everything",
                                          text));
  }
  return path.substr(kUnix.size());
}

}  // namespace

uint64_t number_value(const po::variables_map& values, const std::string& name, uint64_t min,
                      uint64_t max) {
  return parse_number(name, values[name].as<std::string>(), min, max);
}

uint64_t parse_number(const std::string& name, const std::string& text, uint64_t min,
                      uint64_t max) {
  uint64_t number = 0;
  const char* end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, number);
  if (parsed.ec != std::errc() || parsed.ptr != end || number < min || number > max) {
    throw base::Error(
        EINVAL, fmt::format("--{} {}: a number from {} to {} is expected", name, text, min, max));
  }
  return number;
}

control::Config make_config(const po::variables_map& values) {
  set_log_level(values["log-level"].as<std::string>());
  control::Config config;
  config.io_threads =
      static_cast<unsigned>(number_value(values, "io-threads", 1, base::EventLoop::kMaxLoops));
  config.io_backend = backend_choice(values["io-backend"].as<std::string>());
  config.open_policy.backing_roots = list(values, "backing-root");
  for (const std::string& text : list(values, "object")) {
    block::crypto::add_object(text);
  }
  for (const std::string& text : list(values, "blockdev")) {
    config.blockdevs.push_back(block::Options::from_text(text));
  }
  unsigned number = 0;
  for (const std::string& text : list(values, "disk")) {
    config.disks.push_back(control::parse_disk(text, number++));
  }
  for (const std::string& text : list(values, "fuse")) {
    config.fuse.push_back(control::parse_fuse(text));
  }
  GivenFds given;
  add_listeners(config, list(values, "nbd"), given);
  config.nbd_allow_remote = values.count("nbd-allow-remote") != 0;
  for (const std::string& text : list(values, "export")) {
    config.exports.push_back(control::parse_export(text));
  }
  if (values.count("qmp") != 0)
    config.control_socket = socket_path(values["qmp"].as<std::string>());
  check_exports(config);
  if (values.count("ready-fd") != 0) {
    config.ready_fd = static_cast<int>(number_value(values, "ready-fd", 0, INT_MAX));
    given.take(fmt::format("--ready-fd {}", config.ready_fd), config.ready_fd);
  }
  config.confine_threads = values.count("no-seccomp") == 0;
  if (values.count("pid-file") != 0) config.pid_file = values["pid-file"].as<std::string>();
  config.shutdown_timeout =
      std::chrono::seconds(number_value(values, "shutdown-timeout", 0, kMaxShutdownSeconds));
  return config;
}

}  // namespace minivmm::cli
