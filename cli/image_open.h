// SPDX-License-Identifier: Apache-2.0
// Opens the images that a command names: by path or by options, with the backing files that they
// record, as the personality allows it.
//
// Fiber throughout, of the graph's first loop.
#pragma once

#include <string>
#include <string_view>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <boost/program_options.hpp>

#include "base/error.h"
#include "block/graph/edge.h"
#include "block/graph/options.h"
#include "cli/image_graph.h"

namespace minivmm::cli {

// qemu-img's cache modes.
struct CacheMode {
  bool direct = false;
  bool no_flush = false;
  bool write_through = false;
};
// Throws EINVAL: "Invalid <what> option: text". Empty text is `otherwise`.
CacheMode parse_cache_mode(const std::string& text, std::string_view what,
                           std::string_view otherwise);

// -t, and -T.
CacheMode target_cache(const boost::program_options::variables_map& values,
                       std::string_view otherwise);
CacheMode source_cache(const boost::program_options::variables_map& values);

// An image as the user names it.
struct ImageName {
  std::string text;         // a path, or options
  std::string format = {};  // empty: guessed
  bool is_options = false;  // --image-opts, or "json:{...}"
  std::string inode = {};  // DEVICE:INODE that the file of a path has to be; empty: whichever it is
};

// `text` with what -f (or another option for the format) and --image-opts say; and the one image
// that most subcommands take.
ImageName named_image(const boost::program_options::variables_map& values, std::string text,
                      const char* format_option = "format");
ImageName one_image(const boost::program_options::variables_map& values);

// Options of a node, by their keys.
using NodeOptions = std::vector<std::pair<std::string, std::string>>;

// What opens a snapshot and not the disk: "name or number", or "snapshot.id=ID,snapshot.name=NAME".
// Throws EINVAL.
NodeOptions snapshot_options(const std::string& text);

struct OpenMode {
  bool writable = false;
  bool force_share = false;
  bool with_backing = true;  // false: the layer alone
  // Follow what the image records wherever it leads: it is our own, or the user said so.
  bool trusted = false;
  CacheMode cache = {};
  // More options of the image's own node, as --image-opts has them: the ids of secrets.
  NodeOptions options = {};
  // A snapshot to be read and not the disk: see snapshot_options().
  NodeOptions snapshot = {};
};

// An image that is open. Closed by close(), which reports what that finds, or by the destructor,
// which logs it.
class OpenImage {
 public:
  // Throws "Could not open 'NAME': why". Where an image that is to be written was only guessed to
  // be raw, it prints qemu-img's warning.
  OpenImage(ImageGraph& graph, const ImageName& name, const OpenMode& mode);
  ~OpenImage();
  OpenImage(const OpenImage&) = delete;
  OpenImage& operator=(const OpenImage&) = delete;

  block::Edge& edge() noexcept { return *edge_; }
  const std::string& name() const noexcept { return name_; }
  const std::string& format() const noexcept { return format_; }
  // True where the format was guessed and not given.
  bool guessed() const noexcept { return guessed_; }
  // In whole sectors, as qemu-img counts: reads past the end of a raw file give zeroes.
  uint64_t size() const noexcept;
  void close();

 private:
  block::Graph& graph_;
  const std::string name_;
  std::string format_;
  bool guessed_ = false;
  std::string node_name_;
  std::unique_ptr<block::Edge> edge_;
};

// qemu-img's warning, where an image that is to be written was only guessed to be raw.
void warn_of_guess(const std::string& name);

// One image of a chain, as found in the files.
struct ChainLink {
  std::string path;
  std::string format;
  uint64_t size = 0;
  std::string recorded_name = {};  // of its backing file; empty: none
  std::string recorded_format = {};
  std::string data_file = {};  // where its data is, if not in itself
  std::string inode = {};      // DEVICE:INODE of the file that was looked at; empty: not known
};

// A file as it is to be looked at.
struct FileToOpen {
  std::string path;
  std::string format = {};  // empty: to be guessed
  std::string inode = {};   // DEVICE:INODE that it has to be; empty: whichever has the name
};

// The images from a file down the recorded backing files. Which of those are opened is up to the
// mode, the personality and the graph's policy. Throws ELOOP with the chain for loops and absurd
// chains, naming "Could not open backing file" otherwise.
std::vector<ChainLink> find_chain(ImageGraph& graph, const FileToOpen& file, const OpenMode& mode);
// The same; `chain`, which is empty, holds what was found also where it throws.
void find_chain(ImageGraph& graph, const FileToOpen& file, const OpenMode& mode,
                std::vector<ChainLink>& chain);

// The options of the node for a path. `format` not empty. `inode`: DEVICE:INODE that the file has
// to be, or nothing.
block::Options layer_options(const std::string& path, const std::string& format,
                             const OpenMode& mode, const std::string& inode = {});

// Called as qemu-img: throws what it says of a file that cannot be opened. Otherwise nothing: the
// message of opening it says it better.
void require_openable(const std::string& path, const std::string& name);

// An error of opening a file or of looking at it, in the words of the personality: "Could not open
// 'NAME': why", and of one that is locked who has it.
[[noreturn]] void refuse_open(base::Error& error, const std::string& path, const std::string& name,
                              bool writable);

// True if both names lead to one file.
bool same_file(const std::string& a, const std::string& b);

}  // namespace minivmm::cli
