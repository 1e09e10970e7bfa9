// SPDX-License-Identifier: Apache-2.0
// The table of drivers: one line a driver.
#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "block/filters/fault.h"
#include "block/filters/log_writes.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/formats/raw.h"
#include "block/graph/driver.h"
#include "block/protocols/file.h"
#include "block/protocols/memory.h"
#include "block/protocols/null.h"

namespace minivmm::block {

namespace {

constexpr Driver kDrivers[] = {
    {"file", &open_file},    {"host_device", &open_file}, {"raw", &open_raw},
    {"qcow2", &open_qcow2},  {"memory", &open_memory},    {"null", &open_null},
    {"null-co", &open_null}, {"fault", &open_fault},      {"log-writes", &open_log_writes},
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
