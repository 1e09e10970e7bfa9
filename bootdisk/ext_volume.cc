// SPDX-License-Identifier: Apache-2.0
#include "bootdisk/ext_volume.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <new>

// The library's header has inline functions in the C of its time.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <ext2fs/ext2fs.h>
#pragma GCC diagnostic pop
#include <fmt/core.h>

#include "base/bytes.h"
#include "base/error.h"

namespace minivmm::bootdisk {

using base::Error;

namespace {

// --- The library's way to the bytes ---

struct Window {
  ByteSource* disk;
  Volume volume;
};

// ext2fs_open2 knows names only; one thread opens one volume at a time.
thread_local const Window* opening = nullptr;

errcode_t channel_close(io_channel channel) {
  if (--channel->refcount > 0) return 0;
  delete static_cast<Window*>(channel->private_data);
  ::free(channel->name);
  ::free(channel);
  return 0;
}

errcode_t channel_set_block_size(io_channel channel, int size) {
  channel->block_size = size;
  return 0;
}

// A negative count is in bytes.
errcode_t channel_read64(io_channel channel, unsigned long long block, int count, void* data) {
  const auto* window = static_cast<const Window*>(channel->private_data);
  const auto block_size = static_cast<uint64_t>(channel->block_size);
  const uint64_t bytes = count < 0 ? static_cast<uint64_t>(-int64_t{count})
                                   : static_cast<uint64_t>(count) * block_size;
  if (block > window->volume.length / block_size) return EXT2_ET_SHORT_READ;
  const uint64_t offset = block * block_size;
  if (bytes > window->volume.length - offset) return EXT2_ET_SHORT_READ;
  try {
    window->disk->read(window->volume.offset + offset, {static_cast<std::byte*>(data), bytes});
    return 0;
  } catch (const Error& e) {
    return e.err();
  } catch (const std::exception&) {
    return ENOMEM;
  }
}

errcode_t channel_read(io_channel channel, unsigned long block, int count, void* data) {
  return channel_read64(channel, block, count, data);
}
errcode_t channel_write64(io_channel, unsigned long long, int, const void*) {
  return EXT2_ET_RO_FILSYS;
}
errcode_t channel_write(io_channel, unsigned long, int, const void*) { return EXT2_ET_RO_FILSYS; }
errcode_t channel_flush(io_channel) { return 0; }

errcode_t channel_open(const char* name, int flags, io_channel* out);

io_manager manager() {
  static struct_io_manager instance = [] {
    struct_io_manager m{};
    m.magic = EXT2_ET_MAGIC_IO_MANAGER;
    m.name = "minivmm disk";
    m.open = &channel_open;
    m.close = &channel_close;
    m.set_blksize = &channel_set_block_size;
    m.read_blk = &channel_read;
    m.read_blk64 = &channel_read64;
    m.write_blk = &channel_write;
    m.write_blk64 = &channel_write64;
    m.flush = &channel_flush;
    return m;
  }();
  return &instance;
}

// The library frees what it finds here with its own allocator, which is malloc's.
errcode_t channel_open(const char* name, int, io_channel* out) {
  auto* channel = static_cast<io_channel>(::calloc(1, sizeof(struct_io_channel)));
  if (channel == nullptr) return ENOMEM;
  channel->magic = EXT2_ET_MAGIC_IO_CHANNEL;
  channel->manager = manager();
  channel->name = ::strdup(name);
  channel->private_data = new (std::nothrow) Window(*opening);
  channel->block_size = 1024;
  channel->refcount = 1;
  if (channel->name == nullptr || channel->private_data == nullptr) {
    channel_close(channel);
    return ENOMEM;
  }
  *out = channel;
  return 0;
}

std::string reason(errcode_t code) { return error_message(code); }

bool has_magic(ByteSource& disk, const Volume& volume) {
  constexpr uint64_t kMagicAt = 1024 + 56;
  std::array<std::byte, 2> magic;
  if (volume.length < kMagicAt + magic.size()) return false;
  disk.read(volume.offset + kMagicAt, magic);
  return base::load_le<uint16_t>(magic.data()) == EXT2_SUPER_MAGIC;
}

}  // namespace

struct ExtVolume::Library {
  ext2_filsys fs = nullptr;

  ~Library() {
    if (fs != nullptr) ext2fs_free(fs);
  }
  // 0: there is none.
  ext2_ino_t find(const std::string& path) const {
    ext2_ino_t inode = 0;
    if (ext2fs_namei_follow(fs, EXT2_ROOT_INO, EXT2_ROOT_INO, path.c_str(), &inode) != 0) return 0;
    return inode;
  }
};

ExtVolume::ExtVolume(const Volume& volume, std::unique_ptr<Library> library)
    : volume_(volume), library_(std::move(library)) {}

ExtVolume::~ExtVolume() = default;

std::unique_ptr<ExtVolume> ExtVolume::open(ByteSource& disk, const Volume& volume) {
  if (!has_magic(disk, volume)) return nullptr;
  initialize_ext2_error_table();
  const Window window{&disk, volume};
  auto library = std::make_unique<Library>();
  opening = &window;
  const errcode_t result =
      ext2fs_open2("disk", nullptr, EXT2_FLAG_64BITS, 0, 0, manager(), &library->fs);
  opening = nullptr;
  if (result != 0) throw Error(EIO, fmt::format("its ext4 file system: {}", reason(result)));
  return std::unique_ptr<ExtVolume>(new ExtVolume(volume, std::move(library)));
}

bool ExtVolume::needs_recovery() const noexcept {
  return ext2fs_has_feature_journal_needs_recovery(library_->fs->super) != 0;
}

bool ExtVolume::exists(const std::string& path) const { return library_->find(path) != 0; }

std::vector<std::string> ExtVolume::list(const std::string& directory) const {
  std::vector<std::string> names;
  const ext2_ino_t inode = library_->find(directory);
  if (inode == 0) return names;
  const auto visit = [](ext2_dir_entry* entry, int, int, char*, void* to) -> int {
    auto& out = *static_cast<std::vector<std::string>*>(to);
    const auto length = static_cast<size_t>(ext2fs_dirent_name_len(entry));
    try {
      out.emplace_back(entry->name, length);
    } catch (const std::bad_alloc&) {
      return DIRENT_ABORT;
    }
    return out.size() >= kMaxNames ? DIRENT_ABORT : 0;
  };
  (void)ext2fs_dir_iterate(library_->fs, inode, 0, nullptr, visit, &names);
  return names;
}

void ExtVolume::copy(const std::string& path, uint64_t limit,
                     const std::function<void(std::span<const std::byte>)>& sink) const {
  const auto fail = [&](int err, const std::string& why) { return Error(err, path + ": " + why); };
  const ext2_ino_t inode = library_->find(path);
  if (inode == 0) throw fail(ENOENT, "not found");
  ext2_inode info{};
  if (const errcode_t result = ext2fs_read_inode(library_->fs, inode, &info); result != 0) {
    throw fail(EIO, reason(result));
  }
  if (!LINUX_S_ISREG(info.i_mode)) throw fail(EINVAL, "is not a regular file");
  ext2_file_t raw = nullptr;
  if (const errcode_t result = ext2fs_file_open(library_->fs, inode, 0, &raw); result != 0) {
    throw fail(EIO, reason(result));
  }
  const std::unique_ptr<ext2_file, errcode_t (*)(ext2_file_t)> file(raw, &ext2fs_file_close);
  __u64 size = 0;
  if (const errcode_t result = ext2fs_file_get_lsize(raw, &size); result != 0) {
    throw fail(EIO, reason(result));
  }
  if (size > limit) throw fail(EFBIG, fmt::format("{} bytes are more than {}", size, limit));
  std::vector<std::byte> buffer(std::min<uint64_t>(size, 1 << 20));
  for (uint64_t done = 0; done < size;) {
    unsigned got = 0;
    const auto wanted = static_cast<unsigned>(std::min<uint64_t>(buffer.size(), size - done));
    const errcode_t result = ext2fs_file_read(raw, buffer.data(), wanted, &got);
    if (result != 0) throw fail(EIO, reason(result));
    if (got == 0) throw fail(EIO, "ends early");
    sink({buffer.data(), got});
    done += got;
  }
}

std::optional<std::string> ExtVolume::read_text(const std::string& path) const {
  std::string text;
  try {
    copy(path, kMaxText, [&](std::span<const std::byte> bytes) {
      text.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    });
  } catch (const Error&) {
    return std::nullopt;
  }
  return text;
}

}  // namespace minivmm::bootdisk
