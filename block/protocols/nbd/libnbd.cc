// SPDX-License-Identifier: Apache-2.0
#include "block/protocols/nbd/libnbd.h"

#include <cerrno>

#include "base/shared_library.h"

namespace minivmm::block {
namespace {

Libnbd load() {
  const base::SharedLibrary library("libnbd.so.0", "NBD disks need libnbd 1.12 or later",
                                    "libnbd0");
  Libnbd out{};
  library.find("nbd_create", out.create);
  library.find("nbd_close", out.close);
  library.find("nbd_get_error", out.get_error);
  library.find("nbd_get_errno", out.get_errno);
  library.find("nbd_set_export_name", out.set_export_name);
  library.find("nbd_set_tls", out.set_tls);
  library.find("nbd_set_tls_certificates", out.set_tls_certificates);
  library.find("nbd_set_tls_verify_peer", out.set_tls_verify_peer);
  library.find("nbd_set_tls_username", out.set_tls_username);
  library.find("nbd_set_tls_psk_file", out.set_tls_psk_file);
  library.find("nbd_get_tls_negotiated", out.get_tls_negotiated);
  library.find_if_there("nbd_set_tls_hostname", out.set_tls_hostname);
  library.find("nbd_set_pread_initialize", out.set_pread_initialize);
  library.find("nbd_add_meta_context", out.add_meta_context);
  library.find("nbd_can_meta_context", out.can_meta_context);
  library.find("nbd_aio_connect_tcp", out.aio_connect_tcp);
  library.find("nbd_aio_connect_unix", out.aio_connect_unix);
  library.find("nbd_aio_connect_vsock", out.aio_connect_vsock);
  library.find("nbd_aio_disconnect", out.aio_disconnect);
  library.find("nbd_aio_get_fd", out.aio_get_fd);
  library.find("nbd_aio_get_direction", out.aio_get_direction);
  library.find("nbd_aio_notify_read", out.aio_notify_read);
  library.find("nbd_aio_notify_write", out.aio_notify_write);
  library.find("nbd_aio_is_connecting", out.aio_is_connecting);
  library.find("nbd_aio_is_dead", out.aio_is_dead);
  library.find("nbd_aio_is_closed", out.aio_is_closed);
  library.find("nbd_get_size", out.get_size);
  library.find("nbd_get_block_size", out.get_block_size);
  library.find("nbd_get_protocol", out.get_protocol);
  library.find("nbd_is_read_only", out.is_read_only);
  library.find("nbd_can_flush", out.can_flush);
  library.find("nbd_can_fua", out.can_fua);
  library.find("nbd_can_trim", out.can_trim);
  library.find("nbd_can_zero", out.can_zero);
  library.find("nbd_can_fast_zero", out.can_fast_zero);
  library.find("nbd_can_cache", out.can_cache);
  library.find("nbd_can_multi_conn", out.can_multi_conn);
  library.find("nbd_aio_pread_structured", out.aio_pread_structured);
  library.find("nbd_aio_pwrite", out.aio_pwrite);
  library.find("nbd_aio_flush", out.aio_flush);
  library.find("nbd_aio_trim", out.aio_trim);
  library.find("nbd_aio_zero", out.aio_zero);
  library.find("nbd_aio_cache", out.aio_cache);
  library.find("nbd_aio_block_status", out.aio_block_status);
  library.find("nbd_set_opt_mode", out.set_opt_mode);
  library.find("nbd_set_full_info", out.set_full_info);
  library.find("nbd_set_uri_allow_local_file", out.set_uri_allow_local_file);
  library.find("nbd_connect_uri", out.connect_uri);
  library.find("nbd_opt_info", out.opt_info);
  library.find("nbd_opt_go", out.opt_go);
  library.find("nbd_block_status", out.block_status);
  library.find("nbd_opt_list", out.opt_list);
  library.find("nbd_opt_list_meta_context", out.opt_list_meta_context);
  library.find("nbd_get_canonical_export_name", out.get_canonical_export_name);
  library.find("nbd_get_export_description", out.get_export_description);
  library.find("nbd_get_structured_replies_negotiated", out.get_structured_replies_negotiated);
  library.find("nbd_is_rotational", out.is_rotational);
  library.find("nbd_can_df", out.can_df);
  return out;
}

}  // namespace

const Libnbd& libnbd() {
  static base::LoadOnce<Libnbd> functions;
  return functions.get(&load);
}

}  // namespace minivmm::block
