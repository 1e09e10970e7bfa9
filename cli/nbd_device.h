// SPDX-License-Identifier: Apache-2.0
// /dev/nbdN by the netlink interface of the kernel's driver: its device is made of sockets whose
// connections have entered transmission (NbdAttachment).
#pragma once

#include <string>

#include <cstdint>
#include <optional>
#include <vector>

#include "base/nbd_uri.h"
#include "cli/generic_netlink.h"
#include "cli/nbd_attachment.h"

namespace minivmm::cli {

struct NbdDeviceOptions {
  std::optional<uint32_t> index;  // the first that is free, if not said
  uint64_t block_size = 0;        // bytes; 0: what the server needs
  uint64_t timeout = 0;           // seconds until a request without an answer fails; 0: none
  uint64_t hold = 0;              // seconds in which requests wait for a new connection
  bool read_only = false;
  std::string backend;  // what the device belongs to, for is_nbd_backend(); may be empty
};

// Throws ENODEV, saying what to do, where the kernel has no such driver.
GenericNetlink nbd_driver();

// Of "/dev/nbd3" or "nbd3". Throws EINVAL.
uint32_t nbd_device_number(const std::string& name);
bool is_nbd_connected(uint32_t index);
// Whether it is connected and was made with this NbdDeviceOptions::backend.
bool is_nbd_backend(uint32_t index, const std::string& backend);

// So many connections to one export. Throws what nbd_credentials() and attach_to_nbd do, ENOTSUP
// where the server does not allow several.
std::vector<NbdAttachment> attach_all_to_nbd(const base::NbdUri& uri, uint64_t connections);

// Makes a device of the connections, which the kernel then has, and returns its number once it can
// be used. Throws.
uint32_t connect_nbd_device(GenericNetlink& kernel, const NbdDeviceOptions& options,
                            const std::vector<NbdAttachment>& attached);
// Another connection in place of one that broke. Throws.
void mend_nbd_device(GenericNetlink& kernel, uint32_t index,
                     const std::vector<NbdAttachment>& attached);

// Ends a device, and returns when it is gone. Throws ETIMEDOUT where it is in use.
void disconnect_nbd_device(GenericNetlink& kernel, uint32_t index);

}  // namespace minivmm::cli
