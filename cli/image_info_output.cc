// SPDX-License-Identifier: Apache-2.0
#include "cli/image_info_output.h"

#include <string_view>

#include <algorithm>
#include <ctime>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "cli/image_arguments.h"

namespace minivmm::cli {

namespace crypto = block::crypto;
namespace qcow2 = block::qcow2;
using Json = nlohmann::ordered_json;

namespace {

constexpr uint64_t kNanoseconds = 1'000'000'000;

Json bitmap_list(const std::vector<qcow2::BitmapEntry>& bitmaps) {
  Json out = Json::array();
  for (const qcow2::BitmapEntry& bitmap : bitmaps) {
    Json flags = Json::array();
    if ((bitmap.flags & qcow2::kBitmapInUse) != 0) flags.push_back("in-use");
    if ((bitmap.flags & qcow2::kBitmapAuto) != 0) flags.push_back("auto");
    out.push_back({{"flags", flags},
                   {"name", bitmap.name},
                   {"granularity", uint64_t{1} << bitmap.granularity_bits}});
  }
  return out;
}

Json snapshot_list(const std::vector<qcow2::SnapshotEntry>& snapshots) {
  Json out = Json::array();
  for (const qcow2::SnapshotEntry& snapshot : snapshots) {
    Json item = Json::object();
    if (snapshot.instructions) item["icount"] = *snapshot.instructions;
    item["vm-clock-nsec"] = snapshot.vm_clock_nanoseconds % kNanoseconds;
    item["name"] = snapshot.name;
    item["date-sec"] = snapshot.date_seconds;
    item["date-nsec"] = snapshot.date_nanoseconds;
    item["vm-clock-sec"] = snapshot.vm_clock_nanoseconds / kNanoseconds;
    item["id"] = snapshot.id;
    item["vm-state-size"] = snapshot.vm_state_bytes;
    out.push_back(std::move(item));
  }
  return out;
}

// Of a LUKS header, in qemu-img's order. Nothing of it is secret.
Json luks_data(const crypto::Luks1Header& h, bool in_qcow2) {
  Json out = Json::object();
  out["ivgen-alg"] = iv_generator_name(h.cipher.iv);
  out["hash-alg"] = hash_name(h.hash);
  out["cipher-alg"] = cipher_algorithm_name(h.cipher.algorithm);
  out["uuid"] = h.uuid;
  if (h.cipher.iv == crypto::IvGenerator::kEssiv) {
    out["ivgen-hash-alg"] = hash_name(h.cipher.iv_hash);
  }
  if (in_qcow2) out["format"] = "luks";
  out["cipher-mode"] = cipher_mode_name(h.cipher.mode);
  Json slots = Json::array();
  for (const crypto::Luks1Slot& slot : h.slots) {
    Json item{{"active", slot.active}};
    if (slot.active) item["iters"] = slot.iterations;
    item["key-offset"] = slot.material_offset();
    if (slot.active) item["stripes"] = slot.stripes;
    slots.push_back(std::move(item));
  }
  out["slots"] = std::move(slots);
  out["payload-offset"] = h.payload_offset();
  out["master-key-iters"] = h.mk_iterations;
  return out;
}

// qemu-img's "format-specific" of a qcow2 image, in its order.
Json format_specific(const ImageFacts& facts) {
  const qcow2::Header& h = *facts.qcow2;
  const bool v3 = h.version >= 3;
  Json data = Json::object();
  data["compat"] = v3 ? "1.1" : "0.10";
  data["compression-type"] = h.compression == qcow2::Compression::kZstd ? "zstd" : "zlib";
  if (v3) data["lazy-refcounts"] = (h.compatible & qcow2::kCompatLazyRefcounts) != 0;
  if (!facts.bitmaps.empty()) data["bitmaps"] = bitmap_list(facts.bitmaps);
  data["refcount-bits"] = uint64_t{1} << h.refcount_order;
  const bool data_file = (h.incompatible & qcow2::kIncompatDataFile) != 0;
  if (data_file && !h.data_file.empty()) data["data-file"] = h.data_file;
  if (h.crypt_method != 0) {
    data["encrypt"] = facts.luks ? luks_data(*facts.luks, true) : Json{{"format", "aes"}};
  }
  if (data_file) {
    data["data-file-raw"] = (h.autoclear & qcow2::kAutoclearRawData) != 0;
  }
  if (v3) {
    data["corrupt"] = (h.incompatible & qcow2::kIncompatCorrupt) != 0;
    data["extended-l2"] = (h.incompatible & qcow2::kIncompatExtendedL2) != 0;
  }
  return data;
}

bool is_dirty(const ImageFacts& facts) {
  return facts.qcow2 && (facts.qcow2->incompatible & qcow2::kIncompatDirty) != 0;
}

bool is_encrypted(const ImageFacts& facts) {
  return facts.luks || (facts.qcow2 && facts.qcow2->crypt_method != 0);
}

Json to_json(const ImageFacts& facts) {
  Json out = Json::object();
  if (!facts.snapshots.empty()) out["snapshots"] = snapshot_list(facts.snapshots);
  if (facts.has_backing() && !facts.qcow2->backing_format.empty()) {
    out["backing-filename-format"] = facts.qcow2->backing_format;
  }
  out["virtual-size"] = facts.virtual_size;
  out["filename"] = facts.path;
  if (facts.qcow2) out["cluster-size"] = facts.qcow2->geometry().cluster_size();
  out["format"] = facts.format;
  if (facts.actual_size) out["actual-size"] = *facts.actual_size;
  if (facts.qcow2) {
    out["format-specific"] = Json{{"type", "qcow2"}, {"data", format_specific(facts)}};
  }
  if (facts.format == "luks") {
    out["format-specific"] = Json{{"type", "luks"}, {"data", luks_data(*facts.luks, false)}};
  }
  if (facts.has_backing()) {
    out["full-backing-filename"] = facts.full_backing_path();
    out["backing-filename"] = facts.qcow2->backing_file;
  }
  if (is_encrypted(facts)) out["encrypted"] = true;
  out["dirty-flag"] = is_dirty(facts);
  return out;
}

// Names may be any bytes; JSON is UTF-8. An empty list is two lines, as qemu-img prints it.
std::string dump(const Json& json) {
  std::string out = json.dump(4, ' ', false, Json::error_handler_t::replace) + "\n";
  constexpr std::string_view kEmpty = ": []";  // no name has a line's end after that
  for (size_t at = out.find(kEmpty); at != std::string::npos; at = out.find(kEmpty, at + 1)) {
    const std::string_view rest = std::string_view(out).substr(at + kEmpty.size());
    if (!rest.starts_with("\n") && !rest.starts_with(",\n")) continue;
    const size_t line = out.rfind('\n', at) + 1;
    const size_t indent = out.find_first_not_of(' ', line) - line;
    out.insert(at + 3, "\n" + std::string(indent, ' '));
  }
  return out;
}

// "    refcount bits: 16": a tree as qemu-img prints it, dashes as spaces.
void print_tree(std::string& out, const Json& tree, int level) {
  const std::string indent(static_cast<size_t>(level) * 4, ' ');
  size_t number = 0;
  for (const auto& [key, value] : tree.items()) {
    std::string label = tree.is_array() ? fmt::format("[{}]", number++) : key;
    if (!tree.is_array()) std::replace(label.begin(), label.end(), '-', ' ');
    if (value.is_structured()) {
      out += fmt::format("{}{}:\n", indent, label);
      print_tree(out, value, level + 1);
    } else {
      const std::string text =
          value.is_string() ? printable(value.get<std::string>()) : value.dump();
      out += fmt::format("{}{}: {}\n", indent, label, text);
    }
  }
}

void add_backing(std::string& out, const ImageFacts& facts) {
  const std::string& name = facts.qcow2->backing_file;
  const std::string full = facts.full_backing_path();
  out += fmt::format("backing file: {}", printable(name));
  if (full != name) out += fmt::format(" (actual path: {})", printable(full));
  out += "\n";
  if (!facts.qcow2->backing_format.empty()) {
    out += fmt::format("backing file format: {}\n", printable(facts.qcow2->backing_format));
  }
}

// In local time, as qemu-img.
std::string date_text(uint32_t seconds) {
  const auto when = static_cast<time_t>(seconds);
  std::tm parts{};
  char text[32] = "";
  if (::localtime_r(&when, &parts) != nullptr) {
    std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S", &parts);
  }
  return text;
}

std::string clock_text(uint64_t nanoseconds) {
  const uint64_t seconds = nanoseconds / kNanoseconds;
  return fmt::format("{:02}:{:02}:{:02}.{:03}", seconds / 3600, seconds / 60 % 60, seconds % 60,
                     nanoseconds / 1'000'000 % 1000);
}

void add_snapshots(std::string& out, const ImageFacts& facts) {
  const auto row = [&](std::string_view id, std::string_view tag, std::string_view size,
                       std::string_view date, std::string_view clock, std::string_view count) {
    out +=
        fmt::format("{:<9} {:<16} {:>8} {:>19} {:>12} {:>10}\n", id, tag, size, date, clock, count);
  };
  out += "Snapshot list:\n";
  row("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT");
  for (const qcow2::SnapshotEntry& snapshot : facts.snapshots) {
    row(printable(snapshot.id), printable(snapshot.name), size_text(snapshot.vm_state_bytes),
        date_text(snapshot.date_seconds), clock_text(snapshot.vm_clock_nanoseconds),
        snapshot.instructions ? fmt::format("{}", *snapshot.instructions) : "");
  }
}

}  // namespace

std::string size_text(uint64_t bytes) {
  static constexpr const char* kUnits[] = {"", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"};
  size_t unit = 0;
  auto value = static_cast<double>(bytes);
  for (; value >= 1000 && unit + 1 < std::size(kUnits); ++unit) value /= 1024;
  return fmt::format("{:.3g} {}B", value, kUnits[unit]);
}

std::string info_text(const ImageFacts& facts) {
  std::string out = fmt::format(
      "image: {}\nfile format: {}\nvirtual size: {} ({} bytes)\ndisk size: {}\n",
      printable(facts.path), facts.format, size_text(facts.virtual_size), facts.virtual_size,
      facts.actual_size ? size_text(*facts.actual_size) : "unavailable");
  if (is_encrypted(facts)) out += "encrypted: yes\n";
  if (facts.qcow2) {
    out += fmt::format("cluster_size: {}\n", facts.qcow2->geometry().cluster_size());
  }
  if (is_dirty(facts)) out += "cleanly shut down: no\n";
  if (facts.has_backing()) add_backing(out, facts);
  if (!facts.snapshots.empty()) add_snapshots(out, facts);
  if (facts.qcow2) {
    out += "Format specific information:\n";
    print_tree(out, format_specific(facts), 1);
  }
  if (facts.format == "luks") {
    out += "Format specific information:\n";
    print_tree(out, luks_data(*facts.luks, false), 1);
  }
  return out;
}

std::string snapshots_text(const ImageFacts& facts) {
  std::string out;
  if (!facts.snapshots.empty()) add_snapshots(out, facts);
  return out;
}

std::string info_json(const ImageFacts& facts) { return dump(to_json(facts)); }

std::string info_json(const std::vector<ImageFacts>& chain) {
  Json out = Json::array();
  for (const ImageFacts& facts : chain) out.push_back(to_json(facts));
  return dump(out);
}

}  // namespace minivmm::cli
