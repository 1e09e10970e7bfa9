// SPDX-License-Identifier: Apache-2.0
// The binding to libnbd, loaded when an NBD disk is first opened, not linked: who has none does not
// need it.
//
// A handle is used by one thread at a time here; the functions may be called from any.
#pragma once

#include <libnbd.h>

namespace minivmm::block {

struct Libnbd {
  decltype(&::nbd_create) create;
  decltype(&::nbd_close) close;
  decltype(&::nbd_get_error) get_error;
  decltype(&::nbd_get_errno) get_errno;
  decltype(&::nbd_set_export_name) set_export_name;
  decltype(&::nbd_set_tls) set_tls;
  decltype(&::nbd_set_tls_certificates) set_tls_certificates;
  decltype(&::nbd_set_tls_verify_peer) set_tls_verify_peer;
  decltype(&::nbd_set_tls_username) set_tls_username;
  decltype(&::nbd_set_tls_psk_file) set_tls_psk_file;
  decltype(&::nbd_get_tls_negotiated) get_tls_negotiated;
  int (*set_tls_hostname)(nbd_handle* handle, const char* name);  // 1.22; null before
  decltype(&::nbd_set_pread_initialize) set_pread_initialize;
  decltype(&::nbd_add_meta_context) add_meta_context;
  decltype(&::nbd_can_meta_context) can_meta_context;
  decltype(&::nbd_aio_connect_tcp) aio_connect_tcp;
  decltype(&::nbd_aio_connect_unix) aio_connect_unix;
  decltype(&::nbd_aio_connect_vsock) aio_connect_vsock;
  decltype(&::nbd_aio_disconnect) aio_disconnect;
  decltype(&::nbd_aio_get_fd) aio_get_fd;
  decltype(&::nbd_aio_get_direction) aio_get_direction;
  decltype(&::nbd_aio_notify_read) aio_notify_read;
  decltype(&::nbd_aio_notify_write) aio_notify_write;
  decltype(&::nbd_aio_is_connecting) aio_is_connecting;
  decltype(&::nbd_aio_is_dead) aio_is_dead;
  decltype(&::nbd_aio_is_closed) aio_is_closed;
  decltype(&::nbd_get_size) get_size;
  decltype(&::nbd_get_block_size) get_block_size;
  decltype(&::nbd_get_protocol) get_protocol;
  decltype(&::nbd_is_read_only) is_read_only;
  decltype(&::nbd_can_flush) can_flush;
  decltype(&::nbd_can_fua) can_fua;
  decltype(&::nbd_can_trim) can_trim;
  decltype(&::nbd_can_zero) can_zero;
  decltype(&::nbd_can_fast_zero) can_fast_zero;
  decltype(&::nbd_can_cache) can_cache;
  decltype(&::nbd_can_multi_conn) can_multi_conn;
  decltype(&::nbd_aio_pread_structured) aio_pread_structured;
  decltype(&::nbd_aio_pwrite) aio_pwrite;
  decltype(&::nbd_aio_flush) aio_flush;
  decltype(&::nbd_aio_trim) aio_trim;
  decltype(&::nbd_aio_zero) aio_zero;
  decltype(&::nbd_aio_cache) aio_cache;
  decltype(&::nbd_aio_block_status) aio_block_status;
  decltype(&::nbd_set_opt_mode) set_opt_mode;
  decltype(&::nbd_set_full_info) set_full_info;
  decltype(&::nbd_set_uri_allow_local_file) set_uri_allow_local_file;
  decltype(&::nbd_connect_uri) connect_uri;
  decltype(&::nbd_opt_info) opt_info;
  decltype(&::nbd_opt_go) opt_go;
  decltype(&::nbd_block_status) block_status;
  decltype(&::nbd_opt_list) opt_list;
  decltype(&::nbd_opt_list_meta_context) opt_list_meta_context;
  decltype(&::nbd_get_canonical_export_name) get_canonical_export_name;
  decltype(&::nbd_get_export_description) get_export_description;
  decltype(&::nbd_get_structured_replies_negotiated) get_structured_replies_negotiated;
  decltype(&::nbd_is_rotational) is_rotational;
  decltype(&::nbd_can_df) can_df;
};

// Loads the library at the first call, which reads files: not on a fiber. Throws ENOTSUP saying
// what to install; the next call tries again. Any thread.
const Libnbd& libnbd();

}  // namespace minivmm::block
