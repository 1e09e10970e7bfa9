// SPDX-License-Identifier: Apache-2.0
// The table of drivers: one line a driver.
#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "block/filters/compress.h"
#include "block/filters/fault.h"
#include "block/filters/log_writes.h"
#include "block/filters/write_policy.h"
#include "block/formats/luks/luks_node.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/formats/raw.h"
#include "block/graph/driver.h"
#include "block/protocols/file.h"
#include "block/protocols/memory.h"
#include "block/protocols/nbd/nbd_node.h"
#include "block/protocols/null.h"

namespace minivmm::block {

namespace {

using enum DriverKind;

constexpr Driver kDrivers[] = {
    {"file", kProtocol, &open_file},
    {"host_device", kProtocol, &open_file},
    {"raw", kFormat, &open_raw},
    {"qcow2", kFormat, &open_qcow2},
    {"luks", kFormat, &open_luks},
    {"memory", kProtocol, &open_memory},
    {"null", kProtocol, &open_null},
    {"null-co", kProtocol, &open_null},
    {"nbd", kProtocol, &open_nbd},
    {"fault", kFilter, &open_fault},
    {"log-writes", kFilter, &open_log_writes},
    {"compress", kFilter, &open_compress},
    {"write-policy", kFilter, &open_write_policy},
};

}  // namespace

std::span<const Driver> drivers() { return kDrivers; }

const Driver& find_driver(std::string_view name) {
  std::string list;
  for (const Driver& driver : kDrivers) {
    if (driver.name == name) return driver;
    list += fmt::format("{}{}", list.empty() ? "" : ", ", driver.name);
  }
  throw base::Error(EINVAL, fmt::format("unknown driver '{}'; there are: {}", name, list));
}

}  // namespace minivmm::block
