// SPDX-License-Identifier: Apache-2.0
// What a short command on image files needs to run: event loops and a graph. Owned by the command's
// function; used from its thread, which waits while a fiber of the first loop works.
#pragma once

#include <string>

#include <memory>
#include <type_traits>
#include <utility>

#include "base/event_loop_inl.h"
#include "base/loop_group.h"
#include "block/graph/edge.h"
#include "block/graph/graph.h"

namespace minivmm::cli {

struct FileAccess {
  bool writable = false;
  // Unlocked, a file that others write to can be read (qemu-img's -U).
  bool locked = true;
  bool direct = false;
  // What is flushed need not be durable: nobody relies on what is made before it is finished.
  bool no_flush = false;
  std::string inode = {};  // DEVICE:INODE that the file has to be; empty: whichever it is
};

class ImageGraph {
 public:
  explicit ImageGraph(block::OpenPolicy policy = {}, unsigned loops = 1,
                      base::BackendChoice backend = base::BackendChoice::kAuto);
  ImageGraph(const ImageGraph&) = delete;
  ImageGraph& operator=(const ImageGraph&) = delete;
  ~ImageGraph();

  const block::OpenPolicy& policy() const noexcept { return graph_->policy(); }
  block::Graph& graph() noexcept { return *graph_; }
  base::LoopGroup& loops() noexcept { return loops_; }

  // Calls body() on a fiber and returns what it does.
  template <typename Body>
  auto run(Body&& body) -> std::invoke_result_t<Body> {
    return loops_.loop(0).call("image command", std::forward<Body>(body));
  }

  // Opens the host file `path` alone, without its format, calls body(edge), and closes the file,
  // reporting what that finds. Returns what `body` does. Fiber.
  template <typename Body>
  auto use_file(const std::string& path, const FileAccess& access, Body&& body)
      -> std::invoke_result_t<Body, block::Edge&>;
  // The same with a file that is described by options; what `access` asks for is added to them.
  template <typename Body>
  auto use_file(block::Options file, const FileAccess& access, Body&& body)
      -> std::invoke_result_t<Body, block::Edge&>;

 private:
  // Fiber. The file while `body` runs.
  class OpenFile {
   public:
    OpenFile(block::Graph& graph, block::Options options, const FileAccess& access);
    ~OpenFile();
    OpenFile(const OpenFile&) = delete;
    OpenFile& operator=(const OpenFile&) = delete;
    block::Edge& edge() noexcept { return *edge_; }
    void close();

   private:
    block::Graph& graph_;
    std::string node_name_;
    std::unique_ptr<block::Edge> edge_;
  };

  base::LoopGroup loops_;
  std::unique_ptr<block::Graph> graph_;
};

// The options that open the host file `path`, or an NBD disk, alone.
block::Options file_options(const std::string& path);

template <typename Body>
auto ImageGraph::use_file(const std::string& path, const FileAccess& access, Body&& body)
    -> std::invoke_result_t<Body, block::Edge&> {
  return use_file(file_options(path), access, std::forward<Body>(body));
}

template <typename Body>
auto ImageGraph::use_file(block::Options options, const FileAccess& access, Body&& body)
    -> std::invoke_result_t<Body, block::Edge&> {
  OpenFile file(*graph_, std::move(options), access);
  if constexpr (std::is_void_v<std::invoke_result_t<Body, block::Edge&>>) {
    body(file.edge());
    file.close();
  } else {
    auto result = body(file.edge());
    file.close();
    return result;
  }
}

// The path behind a file name as qemu-img reads it: "file:" in front is dropped. NBD URIs stay what
// they are, and QEMU's older form ("nbd:HOST:PORT:exportname=NAME") becomes one. Throws EINVAL for
// other protocols and for an empty name.
std::string host_path(const std::string& file_name);

// Sets what opens a name that host_path() has given, a file or an NBD disk, under `prefix`
// ("file." or nothing). True for a file of this host.
bool set_protocol(block::Options& options, const std::string& prefix, const std::string& path);

// Where a name recorded in `image` leads: relative names start from the image's own directory.
std::string path_from_image(const std::string& image, const std::string& reference);

}  // namespace minivmm::cli
