// SPDX-License-Identifier: Apache-2.0
// Maps a file of a mount and does what it is told on standard input, a line each, with a line of
// answer: the process that faults pages in must not be the one that serves them, or its page fault
// holds the lock that its server's next mmap waits for.
//     get N     the byte at N, as a number
//     put N V   sets it
//     sync      msync
//     spin      reads all over the mapping with four threads until
//     rest      they are to end
#include <fcntl.h>
#include <signal.h>
#include <string>
#include <sys/mman.h>
#include <sys/prctl.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <iostream>
#include <thread>
#include <vector>

namespace {

constexpr size_t kMapped = 65536;

class Mapper {
 public:
  explicit Mapper(void* mapped) : bytes_(static_cast<volatile unsigned char*>(mapped)) {}
  ~Mapper() { rest(); }
  Mapper(const Mapper&) = delete;
  Mapper& operator=(const Mapper&) = delete;

  int run(const std::string& command) {
    size_t place = 0;
    int value = 0;
    if (command == "get") {
      std::cin >> place;
      return bytes_[place % kMapped];
    }
    if (command == "put") {
      std::cin >> place >> value;
      bytes_[place % kMapped] = static_cast<unsigned char>(value);
      return 0;
    }
    if (command == "sync") {
      return ::msync(const_cast<unsigned char*>(bytes_), kMapped, MS_SYNC) == 0 ? 0 : errno;
    }
    if (command == "spin") {
      spin();
      return 0;
    }
    rest();
    return 0;
  }

 private:
  void spin() {
    resting_ = false;
    for (size_t i = 0; i < 4; ++i) {
      threads_.emplace_back([this, i] {
        for (size_t at = i; !resting_; at = (at + 4099) % kMapped) sum_ += bytes_[at];
      });
    }
  }
  void rest() {
    resting_ = true;
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

  volatile unsigned char* const bytes_;
  std::atomic<bool> resting_{true};
  std::atomic<unsigned> sum_{0};
  std::vector<std::thread> threads_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  (void)::prctl(PR_SET_PDEATHSIG, SIGKILL);
  const int fd = ::open(argv[1], O_RDWR | O_CLOEXEC);
  if (fd < 0) return 1;
  void* const mapped = ::mmap(nullptr, kMapped, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (mapped == MAP_FAILED) {
    std::cout << (errno == ENODEV ? "unsupported" : "failed") << std::endl;
    return 1;
  }
  std::cout << "mapped" << std::endl;
  Mapper mapper(mapped);
  for (std::string command; std::cin >> command;) std::cout << mapper.run(command) << std::endl;
  return 0;
}
