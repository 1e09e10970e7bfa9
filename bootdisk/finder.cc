// SPDX-License-Identifier: Apache-2.0
#include "bootdisk/finder.h"

#include <string_view>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include <fmt/core.h>

#include "base/error.h"
#include "bootdisk/foreign.h"
#include "bootdisk/grub_config.h"
#include "bootdisk/loader_entries.h"

namespace minivmm::bootdisk {

using base::Error;

namespace {

std::string name_of(const Volume& volume) {
  return volume.number == 0 ? "the disk" : fmt::format("partition {}", volume.number);
}

bool newer(const std::string& a, const std::string& b) {
  return ::strverscmp(a.c_str(), b.c_str()) > 0;
}

std::string absolute(std::string path, const std::string& folder) {
  // GRUB may name the device before the path: (hd0,gpt2)/vmlinuz, ($root)/vmlinuz.
  if (path.starts_with('(')) path.erase(0, std::min(path.find(')'), path.size() - 1) + 1);
  return path.starts_with('/') ? path : folder + "/" + path;
}

}  // namespace

Finder::Finder(ByteSource& disk) {
  for (const Volume& volume : find_volumes(disk)) {
    try {
      auto opened = ExtVolume::open(disk, volume);
      if (!opened) {
        const std::string_view name = foreign_content(disk, volume);
        if (!name.empty()) foreign_.push_back(fmt::format("{}: {}", name_of(volume), name));
        continue;
      }
      if (opened->needs_recovery()) {
        notes_.push_back(
            fmt::format("{}: its journal was not replayed: it was not unmounted", name_of(volume)));
      }
      volumes_.push_back(std::move(opened));
    } catch (const Error& e) {
      notes_.push_back(fmt::format("{}: {}", name_of(volume), e.what()));
    }
  }
}

Finder::~Finder() = default;

std::optional<Finder::Found> Finder::find() {
  for (const auto& volume : volumes_) {
    if (auto found = find_on(*volume)) return found;
  }
  return std::nullopt;
}

std::optional<Finder::Found> Finder::find_on(const ExtVolume& volume) {
  for (const std::string boot : {"/boot", ""}) {
    const std::string loader = boot + "/loader/entries";
    if (auto found = choose(volume, loader, loader_entries(volume, boot))) return found;
    for (const std::string name : {"/grub/grub.cfg", "/grub2/grub.cfg"}) {
      const std::string file = boot + name;
      if (auto found = choose(volume, file, grub_entries(volume, file))) return found;
    }
    for (const std::string& folder : {boot + "/extlinux", boot + "/syslinux"}) {
      const std::string file = folder + "/extlinux.conf";
      Entries entries = parse_extlinux(volume.read_text(file).value_or(""));
      for (BootEntry& entry : entries) {
        entry.kernel = absolute(entry.kernel, folder);
        for (std::string& initrd : entry.initrds) initrd = absolute(initrd, folder);
      }
      if (auto found = choose(volume, file, std::move(entries))) return found;
    }
    if (auto entry = newest_kernel(volume, boot)) {
      const std::string file = entry->kernel;
      if (auto found = choose(volume, file, {std::move(*entry)})) return found;
    }
  }
  return std::nullopt;
}

std::optional<Finder::Found> Finder::choose(const ExtVolume& volume, const std::string& file,
                                            Entries entries) {
  chosen_ = &volume;
  for (BootEntry& entry : entries) {
    entry.kernel = absolute(entry.kernel, "");
    bool complete = volume_with(entry.kernel) != nullptr;
    for (std::string& initrd : entry.initrds) {
      initrd = absolute(initrd, "");
      complete = complete && volume_with(initrd) != nullptr;
    }
    if (!complete) continue;
    std::string origin = fmt::format("{}: {}", name_of(volume.volume()), file);
    return Found{std::move(entry), std::move(origin)};
  }
  return std::nullopt;
}

Finder::Entries Finder::loader_entries(const ExtVolume& volume, const std::string& boot) const {
  constexpr std::string_view kSuffix = ".conf";
  const std::string folder = boot + "/loader/entries";
  std::vector<std::string> names = volume.list(folder);
  std::erase_if(names, [&](const std::string& name) { return !name.ends_with(kSuffix); });
  std::sort(names.begin(), names.end(), newer);
  if (names.size() > kMaxEntries) names.resize(kMaxEntries);
  Variables variables;
  for (const std::string name : {"/grub2/grubenv", "/grub/grubenv"}) {
    if (const auto text = volume.read_text(boot + name)) variables = parse_grub_environment(*text);
  }
  Entries entries;
  for (const std::string& name : names) {
    std::string path = folder;
    path.append("/").append(name);
    if (auto entry = parse_loader_entry(volume.read_text(path).value_or(""), variables)) {
      entries.push_back(std::move(*entry));
    }
  }
  // What is kept for a rescue comes last.
  std::stable_partition(entries.begin(), entries.end(), [](const BootEntry& entry) {
    return entry.kernel.find("rescue") == std::string::npos;
  });
  return entries;
}

Finder::Entries Finder::grub_entries(const ExtVolume& volume, const std::string& file) const {
  const auto text = volume.read_text(file);
  if (!text) return {};
  const std::string folder = file.substr(0, file.rfind('/'));
  const auto environment = volume.read_text(folder + "/grubenv");
  return parse_grub_config(*text, parse_grub_environment(environment.value_or("")));
}

std::optional<BootEntry> Finder::newest_kernel(const ExtVolume& volume,
                                               const std::string& boot) const {
  std::vector<std::string> names = volume.list(boot.empty() ? "/" : boot);
  std::sort(names.begin(), names.end(), newer);
  for (const std::string_view prefix : {"vmlinuz-", "vmlinux-", "bzImage", "vmlinuz"}) {
    for (const std::string& name : names) {
      if (!name.starts_with(prefix) || name.find("rescue") != std::string::npos) continue;
      if (!prefix.ends_with('-') && name != prefix) continue;
      const std::string version = name.substr(prefix.size());
      const std::string folder = boot + "/";
      BootEntry entry{name, folder, {}, root_argument()};
      entry.kernel += name;
      for (const std::string& initrd : {"initrd.img-" + version, "initramfs-" + version + ".img",
                                        "initrd-" + version, std::string("initrd.img")}) {
        if (std::find(names.begin(), names.end(), initrd) == names.end()) continue;
        entry.initrds.push_back(folder);
        entry.initrds.back() += initrd;
        break;
      }
      return entry;
    }
  }
  return std::nullopt;
}

// The file system that looks like a root.
std::string Finder::root_argument() const {
  for (const auto& volume : volumes_) {
    if (!volume->exists("/etc") || !volume->exists("/sbin")) continue;
    const std::string& uuid = volume->volume().part_uuid;
    return (uuid.empty() ? std::string("root=/dev/vda") : "root=PARTUUID=" + uuid) + " rw";
  }
  return {};
}

const ExtVolume* Finder::volume_with(const std::string& path) const {
  if (chosen_ != nullptr && chosen_->exists(path)) return chosen_;
  for (const auto& volume : volumes_) {
    if (volume->exists(path)) return volume.get();
  }
  return nullptr;
}

void Finder::copy(const std::string& path, uint64_t limit, const Sink& sink) const {
  const ExtVolume* const volume = volume_with(path);
  if (volume == nullptr) throw Error(ENOENT, path + ": not found");
  volume->copy(path, limit, sink);
}

}  // namespace minivmm::bootdisk
