// SPDX-License-Identifier: Apache-2.0
// qemu-nbd -L: what another server has, as QEMU prints it.
#include <string>

#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "block/crypto/tls_object.h"
#include "block/protocols/nbd/survey.h"
#include "cli/image_arguments.h"
#include "cli/qemu_nbd.h"

namespace minivmm::cli {

using base::Error;

namespace {

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

void add_tls(const QemuNbdRequest& wanted, base::NbdUri& uri) {
  if (wanted.tls_creds.empty()) return;
  try {
    block::crypto::use_tls_object(block::crypto::tls_objects().get(wanted.tls_creds, false), uri);
  } catch (Error& e) {
    e.prepend("Failed to get TLS creds");
    throw;
  }
  uri.tls_hostname = wanted.tls_hostname;
}

block::NbdServerSurvey survey(const base::NbdUri& uri) {
  try {
    return block::survey_nbd_server(uri, /*all=*/true);
  } catch (const Error& e) {
    if (e.err() != ENOENT && e.err() != ECONNREFUSED) throw;
    const std::string where =
        uri.is_unix() ? uri.socket_path : fmt::format("{}:{}", uri.host, uri.port);
    throw Error(e.err(),
                fmt::format("Failed to connect to '{}': {}", where, base::errno_text(e.err())));
  }
}

}  // namespace

int list_qemu_nbd(const QemuNbdRequest& wanted) {
  base::NbdUri uri = qemu_nbd_address(wanted);
  if (!wanted.bind_given && !uri.is_unix()) uri.host = "localhost";
  add_tls(wanted, uri);
  const block::NbdServerSurvey server = survey(uri);
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

}  // namespace minivmm::cli
