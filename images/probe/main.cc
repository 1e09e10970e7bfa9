// SPDX-License-Identifier: Apache-2.0
// The probe guest: finds its disks, runs the jobs of its command line, ends with a status.
#include "arch.h"
#include "arena.h"
#include "clock.h"
#include "job.h"

namespace minivmm::probe {
namespace {

constexpr int kStatusFailed = 1;
constexpr int kStatusBadCommandLine = 2;

constinit Disks disks;

// The value if `word` is KEY=value.
bool value_of(StringView word, StringView key, StringView* value) {
  if (!word.starts_with(key)) return false;
  *value = {word.data() + key.size(), word.size() - key.size()};
  return true;
}

class Probe {
 public:
  explicit Probe(StringView command_line) : command_line_(command_line) {}

  int run() {
    first_pass();
    start_clock(tsc_khz_);
    // Devices after the features to refuse are known.
    for_each_word([this](StringView word) {
      StringView value;
      if (value_of(word, "virtio_mmio.device=", &value)) add_device(value);
    });
    for_each_word([this](StringView word) {
      StringView value;
      if (value_of(word, "job=", &value)) run_jobs(value);
    });
    if (jobs_ == 0) run_one("info");
    const int status = forced_status_ >= 0 ? forced_status_
                       : bad_words_ != 0   ? kStatusBadCommandLine
                       : failed_ != 0      ? kStatusFailed
                                           : 0;
    Line line;
    line.text("probe: done").key("status", static_cast<uint64_t>(status));
    line.key("jobs", jobs_).key("failed", failed_);
    print(line);
    return status;
  }

 private:
  template <typename Function>
  void for_each_word(Function function) {
    StringView rest = command_line_;
    for (StringView word = next_word(rest, " "); !word.empty(); word = next_word(rest, " ")) {
      function(word);
    }
  }

  void first_pass() {
    for_each_word([this](StringView word) {
      StringView value;
      if (value_of(word, "tsc_khz=", &value)) {
        if (!parse_number(value, &tsc_khz_)) complain(word);
      } else if (value_of(word, "disable=", &value)) {
        for (StringView name = next_word(value, ","); !name.empty(); name = next_word(value, ",")) {
          const int bit = feature_bit(name);
          if (bit < 0) complain(word);
          if (bit >= 0) refused_ |= uint64_t{1} << bit;
        }
      }
    });
  }

  void complain(StringView word) {
    ++bad_words_;
    Line line;
    line.text("probe: command line: not understood: ").text(word);
    print(line);
  }

  // SIZE@BASE:GSI[:ID], as Linux reads it.
  void add_device(StringView text) {
    StringView rest = text;
    uint64_t size = 0;
    uint64_t base = 0;
    uint64_t gsi = 0;
    if (!parse_number(next_word(rest, "@"), &size) || !parse_number(next_word(rest, "@:"), &base) ||
        !parse_number(next_word(rest, ":"), &gsi) || size < 0x140 ||
        base + size > (uint64_t{1} << 32) || gsi > 255) {
      complain(text);
      return;
    }
    if (disks.count == kMaxDisks) {
      complain("too many devices");
      return;
    }
    Disk& disk = disks.disk[disks.count];
    const StringView problem = disk.attach(base, static_cast<unsigned>(gsi), disks.count, refused_);
    if (!problem.empty()) {
      ++failed_;
      Line line;
      line.text("probe: device at ").hex(base).text(" FAILED error=\"").text(problem).text("\"");
      print(line);
    } else if (disk.present()) {
      ++disks.count;
    }
  }

  void run_jobs(StringView list) {
    for (StringView job = next_word(list, ","); !job.empty(); job = next_word(list, ",")) {
      StringView rest = job;
      if (next_word(rest, ":") == "shell") {
        shell(job);
      } else {
        run_one(job);
      }
    }
  }

  void run_one(StringView job) {
    ++jobs_;
    if (!run_job(disks, job, ":")) ++failed_;
  }

  void shell(StringView job) {
    ++jobs_;
    Options options;
    StringView word;
    if (!parse_job(job, ":", &options, &word).empty()) complain(word);
    if (!run_shell(disks, options, &forced_status_)) ++failed_;
  }

  StringView command_line_;
  uint64_t tsc_khz_ = 0;
  uint64_t refused_ = 0;
  uint64_t jobs_ = 0;
  uint64_t failed_ = 0;
  uint64_t bad_words_ = 0;
  int forced_status_ = -1;
};

}  // namespace
}  // namespace minivmm::probe

extern "C" [[noreturn]] void probe_main(uint64_t start_info);

// Entered by boot.S at CPL 3, on its own stack, interrupts off.
void probe_main(uint64_t start_info) {
  using namespace minivmm::probe;
  start_interrupts();
  Arena::start(start_info);
  machine_end(Probe(boot_command_line(start_info)).run());
}
