// SPDX-License-Identifier: Apache-2.0
#include "cli/image_sandbox.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <new>

#include <fmt/core.h>

#include "base/error.h"
#include "base/nbd_uri.h"
#include "base/unique_fd.h"
#include "cli/image_arguments.h"
#include "cli/image_lock_holders.h"
#include "cli/image_named_file.h"
#include "cli/image_personality.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using base::Error;
using Strings = std::vector<std::string>;

void add_sandbox_options(po::options_description& options) {
  add_options(options,
              {{"untrusted", nullptr,
                "open no file that the image names (the default, except as qemu-img), and refuse "
                "to work where the kernel cannot keep the command in its sandbox"},
               {"trusted", nullptr, "open the backing files that the image names"},
               {"backing-root", "DIR", "where those may lie, besides the image's own directory"},
               {"limit-memory", "SIZE", "memory for it, at most (default 1G)"},
               {"limit-cpu", "SECONDS", "CPU time for it, at most (default 600)"}});
}

namespace {

constexpr SandboxLimits kUsualLimits{.memory = uint64_t{1} << 30, .cpu_seconds = 600};

}  // namespace

Sandbox::Sandbox(const po::variables_map& values, std::vector<ImageName> images, Backing backing)
    : images_(std::move(images)) {
  const bool trusted = is_set(values, "trusted");
  must_hold_ = is_set(values, "untrusted");
  if (trusted && must_hold_) throw Error(EINVAL, "--trusted and --untrusted exclude each other");
  if (!personality().drop_in) limits_ = kUsualLimits;
  asked_ = backing == Backing::kAsked;
  follow_ = asked_ ||
            (backing == Backing::kIfTrusted && (trusted || (personality().drop_in && !must_hold_)));
  policy_.backing_roots = text_values(values, "backing-root");
  policy_.follow_references = follow_;
  limits_.memory = size_value(values, "limit-memory", "memory limit").value_or(limits_.memory);
  limits_.cpu_seconds =
      size_value(values, "limit-cpu", "CPU time limit").value_or(limits_.cpu_seconds);
}

OpenMode Sandbox::open_mode(OpenMode mode) const noexcept {
  mode.with_backing = follow_;
  return mode;
}

namespace {

void write_all(int to, const std::string& text) {
  for (size_t done = 0; done < text.size();) {
    const ssize_t n = ::write(to, text.data() + done, text.size() - done);
    if (n <= 0) throw base::errno_error(errno, "pipe");
    done += static_cast<size_t>(n);
  }
}

std::string read_all(int from) {
  // The longest chain of the longest names.
  constexpr size_t kMost = size_t{4} << 20;
  std::string text;
  std::array<char, 1024> buffer;
  while (text.size() < kMost) {
    const ssize_t n = ::read(from, buffer.data(), buffer.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    text.append(buffer.data(), static_cast<size_t>(n));
  }
  return text;
}

// What the child answers: names that end in NUL bytes, and what went wrong, if something did, after
// a name that is empty.
std::string answer_of(const std::function<Strings()>& work) {
  std::string out;
  try {
    for (const std::string& name : work()) out += name + '\0';
  } catch (const std::exception& e) {
    out += '\0';
    out += e.what();
  }
  return out;
}

Strings names_in(const std::string& answer) {
  Strings out;
  for (size_t at = 0; at < answer.size();) {
    const size_t end = answer.find('\0', at);
    if (end == at) throw Error(EINVAL, answer.substr(at + 1));
    if (end == std::string::npos)
      throw Error(EIO, "the child that looks for the files ended early");
    out.push_back(answer.substr(at, end - at));
    at = end + 1;
  }
  return out;
}

// Runs `work` in a child and returns, or throws, what it does.
Strings in_child(const std::function<Strings()>& work) {
  int ends[2];
  if (::pipe2(ends, 0) != 0) throw base::errno_error(errno, "pipe");
  base::UniqueFd read_end(ends[0]);
  base::UniqueFd write_end(ends[1]);
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child < 0) throw base::errno_error(errno, "fork");
  if (child == 0) {
    try {
      write_all(write_end.get(), answer_of(work));
    } catch (const std::exception&) {
      ::_exit(1);
    }
    ::_exit(0);
  }
  write_end.reset();
  const std::string answer = read_all(read_end.get());
  while (::waitpid(child, nullptr, 0) < 0 && errno == EINTR) {
  }
  return names_in(answer);
}

// Goes on without what the kernel lacks, unless it must hold.
void apply(bool must_hold, const std::function<void()>& limit) {
  try {
    limit();
  } catch (Error& e) {
    const bool lacking = e.err() == ENOSYS || e.err() == EOPNOTSUPP;
    if (must_hold || !lacking) {
      e.prepend("sandbox");
      throw;
    }
    print_warning(e.what());
  }
}

}  // namespace

// The files of a chain, with those that hold its data.
Strings Sandbox::files_of_chain(const NamedFile& image) const {
  limit_resources(limits_);
  ImageGraph graph(policy_, 1, base::BackendChoice::kEpoll);
  Strings paths;
  std::vector<ChainLink> chain;
  graph.run([&] {
    try {
      find_chain(graph, {image.path, image.format}, {}, chain);
    } catch (const Error&) {
      // A command that looks at the chain link by link says itself where that ends.
      if (!asked_) throw;
    }
  });
  for (const ChainLink& link : chain) {
    paths.push_back(link.path);
    if (!link.data_file.empty()) paths.push_back(link.data_file);
  }
  return paths;
}

Strings Sandbox::files_to_allow() const {
  Strings out;
  for (const ImageName& name : images_) {
    const NamedFile image = named_file(name);
    out.push_back(image.path);
    // Named by options: other file names are among the values.
    block::Options others = image.image;
    for (const char* key : {"backing.file.filename", "data-file.filename"}) {
      if (const auto path = others.take_string(key)) out.push_back(*path);
    }
    if (!follow_ || !image.is_path || image.image.has("backing")) continue;
    const Strings chain = in_child([&] { return files_of_chain(image); });
    out.insert(out.end(), chain.begin(), chain.end());
  }
  return out;
}

void Sandbox::run(const std::function<void(ImageGraph& graph)>& body) {
  Strings files;
  try {
    files = files_to_allow();
  } catch (Error& e) {
    const ImageName& image = images_.front();
    refuse_open(e, image.text, image.text, false);
  }
  apply(true, [&] { limit_resources(limits_); });
  // A server is reached through sockets, and by a library with files of its own.
  const bool remote = std::any_of(files.begin(), files.end(),
                                  [](const std::string& name) { return base::is_nbd_uri(name); });
  if (remote && must_hold_) {
    throw Error(EINVAL, "--untrusted is for files: a server's disk needs the network");
  }
  if (!remote) {
    for (const std::string& file : files) remember_lock_holders(file);
    apply(must_hold_, [&] { limit_files(files); });
    apply(must_hold_, [] { limit_system_calls(); });
  }
  try {
    ImageGraph graph(policy_, 1, base::BackendChoice::kEpoll);
    graph.run([&] { body(graph); });
  } catch (const std::bad_alloc&) {
    throw Error(ENOMEM, limits_.memory == 0
                            ? std::string("out of memory")
                            : fmt::format("more memory is needed than allowed ({} bytes); if the "
                                          "image is trusted, --limit-memory allows more",
                                          limits_.memory));
  }
}

}  // namespace minivmm::cli
