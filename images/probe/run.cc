// SPDX-License-Identifier: Apache-2.0
// Runs jobs by name, from the command line or from the serial line.
#include "arch.h"
#include "job.h"

namespace minivmm::probe {
namespace {

struct JobEntry {
  StringView name;
  void (*run)(Disks&, Options&, Result&);
};
constexpr JobEntry kJobs[] = {
    {"info", job_info},     {"read", job_read},     {"write", job_write},
    {"verify", job_verify}, {"flush", job_flush},   {"discard", job_discard},
    {"zero", job_zero},     {"survey", job_survey}, {"wce", job_wce},
    {"reset", job_reset},   {"errors", job_errors}, {"idle", job_idle},
    {"stress", job_stress}, {"bench", job_bench},   {"hostile", job_hostile},
};

constexpr StringView kShellSeparators = " \t:";
constexpr char kBackspace = 0x08;
constexpr char kDelete = 0x7f;

// A line typed on the serial port. Sleeps while nothing comes.
class LineReader {
 public:
  explicit LineReader(bool echo) : echo_(echo) {}

  StringView next() {
    size_ = 0;
    while (true) {
      serial_wait();
      const auto c = static_cast<char>(serial_read());
      if (c == '\r' || c == '\n') {
        if (echo_) serial_write("\n");
        return {buffer_, size_};
      }
      if (c == kBackspace || c == kDelete) {
        if (size_ > 0) {
          --size_;
          if (echo_) serial_write("\b \b");
        }
      } else if (size_ < sizeof buffer_) {
        buffer_[size_++] = c;
        if (echo_) serial_write({&c, 1});
      }
    }
  }

 private:
  bool echo_;
  size_t size_ = 0;
  char buffer_[512];
};

}  // namespace

bool run_job(Disks& disks, StringView text, StringView separators) {
  Options options;
  StringView word;
  const StringView problem = parse_job(text, separators, &options, &word);
  Result result(options.name);
  if (!problem.empty()) {
    result.keys().text(" word=\"").text(word).text("\"");
    result.fail(problem);
    result.print_line();
    return false;
  }
  for (const auto& job : kJobs) {
    if (job.name != options.name) continue;
    job.run(disks, options, result);
    result.print_line();
    return !result.failed();
  }
  result.fail("no such job");
  result.print_line();
  return false;
}

bool run_shell(Disks& disks, const Options& shell, int* status) {
  serial_write("probe: shell\n");
  LineReader reader(shell.echo);
  bool all_good = true;
  while (true) {
    StringView line = reader.next();
    StringView rest = line;
    const StringView name = next_word(rest, kShellSeparators);
    if (name.empty()) continue;
    if (name == "reboot") {
      out8(0x64, 0xfe);  // the keyboard controller's reset line
      continue;
    }
    if (name != "exit") {
      all_good = run_job(disks, line, kShellSeparators) && all_good;
      continue;
    }
    Options options;
    StringView word;
    if (!parse_job(line, kShellSeparators, &options, &word).empty()) {
      serial_write("probe: exit FAILED error=\"exit takes a status from 0 to 255\"\n");
      continue;
    }
    if (options.status_given) *status = static_cast<int>(options.status);
    return all_good;
  }
}

}  // namespace minivmm::probe
