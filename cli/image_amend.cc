// SPDX-License-Identifier: Apache-2.0
// minivmm image amend
#include <cerrno>
#include <cstdio>

#include <fmt/core.h>

#include "base/error.h"
#include "block/formats/luks/luks_node.h"
#include "block/formats/qcow2/amend.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "cli/command.h"
#include "cli/image_arguments.h"
#include "cli/image_commands.h"
#include "cli/image_create_options.h"
#include "cli/image_open.h"
#include "cli/image_progress.h"

namespace minivmm::cli {

namespace po = boost::program_options;
namespace qcow2 = block::qcow2;
using base::Error;

ImageSyntax image_amend_syntax() {
  return image_syntax(
      "Usage: minivmm image amend [options] -o NAME=VALUE,... FILE\n\n"
      "Changes how an image is stored, without changing what its disk holds. Of qcow2: the "
      "version,\n"
      "features, and the names that it records. Of an encrypted image the passwords: one that is\n"
      "there opens it, another is added or erased.\n\n"
      "Examples:\n"
      "  minivmm image amend -o compat=1.1,lazy_refcounts=on disk.qcow2\n"
      "  minivmm image amend -f luks -o help          # every option\n"
      "  minivmm image amend --object secret,id=old,file=old.txt --object "
      "secret,id=new,file=new.txt \\\n"
      "    --image-opts driver=luks,file.filename=disk.luks,key-secret=old \\\n"
      "    -o state=active,new-secret=new\n"
      "  minivmm image amend --object secret,id=new,file=new.txt \\\n"
      "    --image-opts driver=luks,file.filename=disk.luks,key-secret=new -o "
      "state=inactive,keyslot=0\n\n",
      {
          {"options,o", "NAME=VALUE,...", "what to change; `-o help` lists the options"},
          {"force", nullptr,
           "also what makes the data unreadable: erasing the last password, writing over one"},
      },
      "ftipq");
}

namespace {

struct AmendRequest {
  ImageName image;
  std::vector<std::string> options;
  CacheMode cache;
  bool force = false;
};

bool asks_for_help(const AmendRequest& request) {
  for (const std::string& text : request.options) {
    if (CreateOptionList::asks_for_help(text)) return true;
  }
  return false;
}

block::crypto::Luks1AmendOptions key_slots(block::Options& options, bool force) {
  auto out = block::crypto::take_luks1_amend_options(options);
  out.force = force;
  return out;
}

// What can be done while it is open; the rest of the options is left.
void amend_open(OpenImage& image, block::Options& options, bool force) {
  block::Node& node = image.edge().node();
  if (auto* luks = dynamic_cast<block::LuksNode*>(&node)) {
    return luks->amend(key_slots(options, force));
  }
  if (const auto encrypt = options.take_child("encrypt")) {
    dynamic_cast<block::Qcow2Node&>(node).amend_encryption(key_slots(*encrypt->options, force));
  }
}

void amend_qcow2(ImageGraph& graph, OpenImage& image, block::Options& options) {
  const std::optional<uint64_t> size = options.take_size("size");
  const qcow2::AmendOptions wanted = qcow2::take_amend_options(options);
  const qcow2::Header header = dynamic_cast<block::Qcow2Node&>(image.edge().node()).header();
  qcow2::check_amend_options(wanted, header);
  const std::string file = image.edge().node().filename();
  if (size) image.edge().truncate(*size);
  if (wanted.version.value_or(header.version) < header.version) {
    qcow2::expand_zero_clusters(image.edge(), header.has_backing);
  }
  image.close();
  graph.use_file(file, {.writable = true},
                 [&](block::Edge& edge) { qcow2::amend_image(edge, wanted); });
}

// Fiber.
void amend(ImageGraph& graph, const AmendRequest& request) {
  OpenImage image(graph, request.image,
                  {.writable = true, .trusted = true, .cache = request.cache});
  auto list = CreateOptionList::for_amend(image.format());
  if (asks_for_help(request)) {
    fmt::print("{}", list.help());
    return;
  }
  for (const std::string& text : request.options) list.parse(text);
  block::Options options = list.for_driver();
  amend_open(image, options, request.force);
  if (image.format() == "qcow2") {
    amend_qcow2(graph, image, options);
  } else {
    image.close();
  }
}

}  // namespace

int run_image_amend(const po::variables_map& values) {
  AmendRequest request;
  request.options = text_values(values, "options");
  if (request.options.empty()) throw UsageError{"Must specify options (-o)"};
  const std::string format = text_value(values, "format");
  if (!format.empty() && asks_for_help(request)) {
    fmt::print("{}", CreateOptionList::for_amend(format).help());
    return 0;
  }
  if (given_names(values).size() != 1) throw Error(EINVAL, "Expecting one image file name");
  request.image = one_image(values);
  request.cache = target_cache(values, "writeback");
  request.force = is_set(values, "force");
  ImageGraph graph;
  graph.run([&] {
    const bool quiet = is_set(values, "quiet");
    ProgressMeter meter(
        ProgressMeter::choose(is_set(values, "progress") && !quiet, quiet, false),
        [] { return ProgressState{}; }, [] {});
    amend(graph, request);
    meter.finish();
  });
  return 0;
}

}  // namespace minivmm::cli
