// SPDX-License-Identifier: Apache-2.0
// Nodes come and go, and the passwords that they need.
#include <string>

#include <fmt/core.h>

#include "base/error.h"
#include "base/pool.h"
#include "block/crypto/gnutls.h"
#include "block/crypto/object.h"
#include "block/crypto/secret.h"
#include "control/qmp/command.h"
#include "control/qmp/message.h"

namespace minivmm::control::qmp {
namespace {

Json blockdev_add(Target& target, const Arguments& given) {
  block::Options options = block::Options::from_json(dump(given.all()));
  if (!options.has("node-name")) {
    throw Failure("'node-name' must be specified for the root node");
  }
  (void)target.graph().add(std::move(options));
  return Json::object();
}

constexpr Parameter kDel[] = {{"node-name", Kind::kString}};

bool is_there(Target& target, const std::string& name) {
  try {
    return target.graph().find(name) != nullptr;
  } catch (const base::Error&) {
    return false;
  }
}

// A node whose last flush fails goes all the same: its user hears that from the error, because a
// warning in a log is nothing that he could act on.
Json blockdev_del(Target& target, const Arguments& given) {
  const std::string name = given.text("node-name");
  // One that is not there yet: its server may never answer.
  if (target.graph().give_up_opening(name)) return Json::object();
  (void)target.graph().find(name);
  try {
    target.graph().remove(name);
  } catch (const base::Error& e) {
    if (is_there(target, name)) throw;
    throw base::Error(e.err(), fmt::format("node '{}' is gone, but what was written to it may not "
                                           "be safe: {}",
                                           name, e.what()));
  }
  return Json::object();
}

Json object_add(Target&, const Arguments& given) {
  const std::string text = dump(given.all());
  base::Pool::errands().run([&] {
    block::crypto::add_object(text);
    // Whoever uses it cannot load the library, if this was not possible.
    try {
      (void)block::crypto::gnutls();
    } catch (const std::exception&) {
    }
  });
  return Json::object();
}

constexpr Parameter kObjectDel[] = {{"id", Kind::kString}};

Json object_del(Target&, const Arguments& given) {
  const std::string id = given.text("id");
  if (!block::crypto::secrets().has(id)) throw Failure("object '" + id + "' not found");
  block::crypto::secrets().remove(id);
  return Json::object();
}

constexpr Command kCommands[] = {
    {"blockdev-add", {}, blockdev_add, true},
    {"blockdev-del", kDel, blockdev_del},
    {"object-add", {}, object_add, true},
    {"object-del", kObjectDel, object_del},
};

}  // namespace

std::span<const Command> node_commands() { return kCommands; }

}  // namespace minivmm::control::qmp
