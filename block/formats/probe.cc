// SPDX-License-Identifier: Apache-2.0
#include "block/formats/probe.h"

#include <cstring>

namespace minivmm::block {
namespace {

struct Signature {
  std::string_view format;
  std::string_view bytes;
};

constexpr Signature kSignatures[] = {
    {"qcow2", std::string_view("QFI\xfb\0\0\0\2", 8)},
    {"qcow2", std::string_view("QFI\xfb\0\0\0\3", 8)},
    {"qcow", std::string_view("QFI\xfb", 4)},
    {"qed", std::string_view("QED\0", 4)},
    {"vmdk", "KDMV"},
    {"vmdk", "COWD"},
    {"vmdk", "# Disk DescriptorFile"},
    {"vhdx", "vhdxfile"},
    {"vpc", "conectix"},
    {"parallels", "WithoutFreeSpace"},
    {"parallels", "WithouFreSpacExt"},
    {"luks", std::string_view("LUKS\xba\xbe", 6)},
    {"dmg", "koly"},
};
constexpr std::string_view kVdiSignature("\x7f\x10\xda\xbe", 4);
constexpr size_t kVdiOffset = 64;

}  // namespace

std::string_view probe_format(std::span<const std::byte> first_bytes) noexcept {
  const std::string_view text(reinterpret_cast<const char*>(first_bytes.data()),
                              first_bytes.size());
  for (const Signature& signature : kSignatures) {
    if (text.starts_with(signature.bytes)) return signature.format;
  }
  if (text.size() > kVdiOffset && text.substr(kVdiOffset).starts_with(kVdiSignature)) return "vdi";
  return "raw";
}

}  // namespace minivmm::block
