// SPDX-License-Identifier: Apache-2.0
#include "fuse/file_table.h"

#include <algorithm>
#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"

namespace minivmm::fuse {
namespace {

constexpr size_t kMaxName = 255;

}  // namespace

void check_file_name(std::string_view name) {
  const char* wrong = nullptr;
  if (name.empty()) {
    wrong = "is empty";
  } else if (name == "." || name == "..") {
    wrong = "means a directory";
  } else if (name.size() > kMaxName) {
    wrong = "is longer than 255 bytes";
  } else if (name.find('/') != std::string_view::npos) {
    wrong = "contains '/'";
  } else if (std::any_of(name.begin(), name.end(), [](char c) {
               return static_cast<unsigned char>(c) < 0x20 || c == 0x7f;
             })) {
    wrong = "contains a control character";
  }
  if (wrong == nullptr) return;
  throw base::Error(EINVAL,
                    fmt::format("FUSE: the export name '{}' {}, so that it cannot be a file "
                                "name; give another with name=",
                                name, wrong));
}

void FileTable::add(const std::string& name, block::Handle handle, bool writable) {
  check_file_name(name);
  const std::lock_guard lock(mutex_);
  for (const auto& [inode, file] : listed_) {
    if (file->name() == name) {
      throw base::Error(EEXIST, fmt::format("FUSE: there is a file '{}' already; give this export "
                                            "another name with name=",
                                            name));
    }
  }
  const uint64_t inode = next_inode_++;
  listed_.emplace(inode, std::make_shared<File>(inode, name, std::move(handle), writable));
}

std::shared_ptr<File> FileTable::remove(const std::string& name, bool only_unused) {
  const std::lock_guard lock(mutex_);
  for (auto it = listed_.begin(); it != listed_.end(); ++it) {
    if (it->second->name() != name) continue;
    if (only_unused && it->second->opens > 0) {
      throw base::Error(EBUSY, fmt::format("FUSE file '{}' is open", name));
    }
    std::shared_ptr<File> file = std::move(it->second);
    listed_.erase(it);
    if (file->opens > 0) unlisted_.emplace(file->inode(), file);
    return file;
  }
  return nullptr;
}

std::shared_ptr<File> FileTable::find(std::string_view name) const {
  const std::lock_guard lock(mutex_);
  for (const auto& [inode, file] : listed_) {
    if (file->name() == name) return file;
  }
  return nullptr;
}

std::shared_ptr<File> FileTable::find(uint64_t inode) const {
  const std::lock_guard lock(mutex_);
  if (const auto found = listed_.find(inode); found != listed_.end()) return found->second;
  const auto found = unlisted_.find(inode);
  return found == unlisted_.end() ? nullptr : found->second;
}

File* FileTable::open(uint64_t inode) {
  const std::lock_guard lock(mutex_);
  const auto found = listed_.find(inode);
  if (found == listed_.end()) return nullptr;
  ++found->second->opens;
  return found->second.get();
}

void FileTable::release(File& file) {
  std::shared_ptr<File> last;  // freed outside the lock
  const std::lock_guard lock(mutex_);
  if (--file.opens > 0) return;
  file.forget_cache();
  if (const auto found = unlisted_.find(file.inode()); found != unlisted_.end()) {
    last = std::move(found->second);
    unlisted_.erase(found);
  }
}

std::shared_ptr<File> FileTable::next_after(uint64_t inode) const {
  const std::lock_guard lock(mutex_);
  const auto found = listed_.upper_bound(inode);
  return found == listed_.end() ? nullptr : found->second;
}

std::vector<std::shared_ptr<File>> FileTable::all() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<File>> out;
  for (const auto& [inode, file] : listed_) out.push_back(file);
  return out;
}

std::vector<std::string> FileTable::describe() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::string> out;
  for (const auto& [inode, file] : listed_) out.push_back(file->describe());
  for (const auto& [inode, file] : unlisted_) out.push_back(file->describe() + " (removed)");
  return out;
}

}  // namespace minivmm::fuse
