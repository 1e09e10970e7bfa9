// SPDX-License-Identifier: Apache-2.0
#include "nbd_client_support.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <iterator>

namespace minivmm::nbd {
namespace {

constexpr unsigned kSteps = 15;
constexpr unsigned kMaxSteps = 100;
// How long a server waits for a client that may be waiting for the server, in milliseconds.
constexpr int kHandshakePatience = 20;
constexpr int kPatience = 4;
constexpr int kLongPatience = 300;

constexpr uint32_t kExportName = 1, kAbort = 2, kInfo = 6, kGo = 7, kStructured = 8, kSetMeta = 10;
constexpr uint32_t kAck = 1, kInfoReply = 3, kContextReply = 4, kUnsupported = 0x80000001;
constexpr uint16_t kRead = 0, kWrite = 1, kDisc = 2, kStatus = 7;

template <typename T>
T number_at(const std::vector<uint8_t>& from, size_t at) {
  return base::load_be<T>(from.data() + at);
}

uint32_t error_of(uint8_t code) {
  constexpr uint32_t kKnown[] = {0, 1, 5, 12, 22, 28, 75, 95, 108, 0xffffffff, 77};
  return kKnown[code % std::size(kKnown)];
}

}  // namespace

Listener::Listener()
    : path_(std::filesystem::temp_directory_path() / ("nbd_fuzz." + std::to_string(::getpid()))),
      socket_(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path_.copy(address.sun_path, sizeof address.sun_path - 1);
  ::unlink(path_.c_str());
  if (::bind(socket_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) != 0 ||
      ::listen(socket_.get(), 64) != 0) {
    std::abort();
  }
  static std::string at_exit = path_;
  std::atexit([] { ::unlink(at_exit.c_str()); });
}

base::UniqueFd Listener::accept() {
  return base::UniqueFd(::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
}

// --- bytes ---

void Conversation::send(const Message& message) {
  std::vector<uint8_t> bytes(message.bytes().begin(), message.bytes().end());
  const auto never = static_cast<uint8_t>(kNeverSent);
  std::replace(bytes.begin(), bytes.end(), never, static_cast<uint8_t>(never + 1));
  waited_ = false;
  for (size_t sent = 0; sent < bytes.size() && open_;) {
    const ssize_t n = ::send(socket_.get(), bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
    if (n > 0) {
      sent += static_cast<size_t>(n);
      continue;
    }
    pollfd both[2] = {{socket_.get(), POLLOUT, 0}, {finished_, POLLIN, 0}};
    open_ = n < 0 && errno == EAGAIN && ::poll(both, 2, kLongPatience) > 0 && both[1].revents == 0;
  }
}

// Each may wait for the other: once in vain is enough.
bool Conversation::wait_for_bytes() {
  if (waited_ && !patient_) return false;
  const int patience = patient_ ? kLongPatience : transmits_ ? kPatience : kHandshakePatience;
  pollfd both[2] = {{socket_.get(), POLLIN, 0}, {finished_, POLLIN, 0}};
  waited_ = ::poll(both, 2, patience) <= 0;
  return !waited_ && both[1].revents == 0;
}

// Exactly so many, into in_. What came of less is gone: whoever sent it does not end it.
bool Conversation::receive(size_t size) {
  in_.clear();
  while (in_.size() < size) {
    uint8_t piece[4096];
    const ssize_t n = ::recv(socket_.get(), piece, std::min(sizeof piece, size - in_.size()), 0);
    if (n > 0) {
      in_.insert(in_.end(), piece, piece + n);
      continue;
    }
    if (n == 0 || errno != EAGAIN) open_ = false;
    if (!open_ || !wait_for_bytes()) return false;
  }
  return true;
}

// --- the conversation ---

void Conversation::run(bool enter_first) {
  if (enter_first) enter(script_.terms, false);
  while (open_ && !script_.input.empty() && ++script_.steps < kMaxSteps) step();
  if (open_ && script_.good_at_last) be_good();
}

void Conversation::be_good() {
  patient_ = true;
  if (!transmits_) enter(script_.terms, false);
  while (open_ && serve_one()) {
  }
}

void Conversation::greet() {
  if (std::exchange(greeted_, true)) return;
  send(Message()
           .raw({reinterpret_cast<const uint8_t*>("NBDMAGIC"), 8})
           .raw({reinterpret_cast<const uint8_t*>("IHAVEOPT"), 8})
           .number(uint16_t{3}));
  (void)receive(4);
}

// An option or a request, whichever it is.
bool Conversation::take() {
  if (!receive(4)) return false;
  if (number_at<uint32_t>(in_, 0) == 0x49484156) {
    if (!receive(12)) return false;
    option_ = number_at<uint32_t>(in_, 4);
    return receive(std::min<size_t>(number_at<uint32_t>(in_, 8), 65536));
  }
  if (!receive(24)) return false;
  const Request got{number_at<uint16_t>(in_, 2), number_at<uint64_t>(in_, 4),
                    number_at<uint64_t>(in_, 12), number_at<uint32_t>(in_, 20)};
  requests_.push_back(got);
  if (got.type == kDisc) open_ = false;
  return got.type != kWrite || receive(got.length);
}

void Conversation::answer_option(uint32_t type, const Message& data, int bias) {
  const auto length = static_cast<uint32_t>(static_cast<int64_t>(data.bytes().size()) + bias);
  send(Message()
           .number(uint64_t{0x3e889045565a9})
           .number(option_)
           .number(type)
           .number(length)
           .raw(data.bytes()));
}

void Conversation::tell_export(const Terms& terms) {
  answer_option(kInfoReply, Message().number(uint16_t{0}).number(terms.size).number(terms.flags));
}

// The first ones count.
void Conversation::settle(const Terms& terms) {
  transmits_ = true;
  structured_ = terms.structured;
  if (!std::exchange(script_.settled, true)) script_.terms = terms;
}

void Conversation::enter(const Terms& terms, bool by_name) {
  greet();
  const bool was_patient = std::exchange(patient_, true);
  while (open_ && !transmits_ && take()) {
    if (option_ == kExportName) {
      send(Message().number(terms.size).number(terms.flags));
      settle(terms);
      break;
    }
    const bool structured = option_ == kStructured || option_ == kSetMeta;
    const bool known =
        (structured && terms.structured) || (!by_name && (option_ == kGo || option_ == kInfo));
    if (known && option_ == kSetMeta && terms.contexts) {
      constexpr std::string_view kName = "base:allocation";
      answer_option(kContextReply,
                    Message()
                        .number(uint32_t{1})
                        .raw({reinterpret_cast<const uint8_t*>(kName.data()), kName.size()}));
    }
    if (known && !structured) tell_export(terms);
    answer_option(known || option_ == kAbort ? kAck : kUnsupported, Message());
    if (known && option_ == kGo) settle(terms);
  }
  patient_ = was_patient;
}

// As it should be.
bool Conversation::serve_one() {
  if (!take() || requests_.empty() || !open_) return false;
  const Request& asked = requests_.back();
  if (asked.type == kRead && structured_) {
    chunk(asked, 1, 1, Message().number(asked.offset).fill(asked.length));
  } else if (asked.type == kStatus) {
    chunk(asked, 1, 5, Message().number(uint32_t{1}).number(asked.length).number(uint32_t{0}));
  } else {
    send(Message()
             .number(uint32_t{0x67446698})
             .number(uint32_t{0})
             .number(asked.cookie)
             .fill(asked.type == kRead ? asked.length : 0));
  }
  return open_;
}

void Conversation::step() {
  Input& input = script_.input;
  switch (input.take<uint8_t>() % kSteps) {
    case 0:
      return send(Message().raw(input.bytes(input.take<uint8_t>())));
    case 1:
      if (!greeted_) return greet();
      return (void)take();
    case 2: {
      constexpr uint32_t kOthers[] = {1, 2, 3, 4, 5, 0, 0xffffffff};
      const auto type = input.take<uint8_t>();
      const auto bias = static_cast<int8_t>(input.take<uint8_t>());
      Message data;
      data.raw(input.bytes(input.take<uint8_t>()));
      return answer_option(
          type < 128 ? kOthers[type % std::size(kOthers)] : 0x80000000u + type % 16, data, bias);
    }
    case 3: {
      Terms terms = script_.terms;
      terms.size = input.take<uint64_t>();
      terms.flags = input.take<uint16_t>();
      tell_export(terms);
      if ((input.take<uint8_t>() & 1) != 0) {
        Message sizes;
        sizes.number(uint16_t{3});
        for (int i = 0; i < 3; ++i) sizes.number(input.take<uint32_t>());
        answer_option(kInfoReply, sizes);
      }
      answer_option(kAck, Message());
      if (option_ == kGo) settle(terms);
      return;
    }
    case 4: {
      constexpr std::string_view kNames[] = {"base:allocation", "", "x:y", "base:"};
      const auto id = input.take<uint32_t>();
      const auto name = kNames[input.take<uint8_t>() % std::size(kNames)];
      answer_option(
          kContextReply,
          Message().number(id).raw({reinterpret_cast<const uint8_t*>(name.data()), name.size()}));
      return answer_option(kAck, Message());
    }
    case 5: {
      constexpr uint64_t kSizes[] = {1 << 20, 1000, 0, 1 << 30, uint64_t{1} << 62, ~uint64_t{0}};
      Terms terms;
      terms.flags = input.take<uint16_t>();
      terms.size = kSizes[input.take<uint8_t>() % std::size(kSizes)];
      const auto how = input.take<uint8_t>();
      terms.structured = (how & 1) != 0;
      terms.contexts = (how & 2) != 0;
      return enter(terms, (how & 4) != 0);
    }
    case 6:
      for (unsigned left = input.take<uint8_t>() % 16; left > 0 && serve_one(); --left) {
      }
      return;
    case 7:
      return simple();
    case 8:
      return data_chunk();
    case 9:
      return hole_chunk();
    case 10:
      return extents_chunk();
    case 11:
      return error_chunk();
    case 12:
      return any_chunk();
    case 13:
      open_ = false;
      return;
    default:
      ::shutdown(socket_.get(), SHUT_WR);
  }
}

// --- replies that may be wrong ---

Conversation::Request Conversation::which() {
  const auto number = script_.input.take<uint8_t>();
  if (requests_.empty()) (void)take();
  if (requests_.empty()) return {kRead, 1, 0, 4096};
  Request out = requests_[requests_.size() - 1 - number % requests_.size()];
  if (number >= 128) out.cookie += number;
  return out;
}

void Conversation::chunk(const Request& to, uint16_t flags, uint16_t type, const Message& payload,
                         int bias) {
  const auto length = static_cast<uint32_t>(static_cast<int64_t>(payload.bytes().size()) + bias);
  send(Message()
           .number(uint32_t{0x668e33ef})
           .number(flags)
           .number(type)
           .number(to.cookie)
           .number(length)
           .raw(payload.bytes()));
}

void Conversation::simple() {
  const Request to = which();
  const uint32_t error = error_of(script_.input.take<uint8_t>());
  const unsigned payload = script_.input.take<uint8_t>() % 4;
  const uint32_t right = std::min(to.length, kMaxPayload);
  const uint32_t sizes[] = {0, right, right == 0 ? 0 : right - 1, right + 1};
  send(Message().number(uint32_t{0x67446698}).number(error).number(to.cookie).fill(sizes[payload]));
}

void Conversation::data_chunk() {
  Input& input = script_.input;
  const Request to = which();
  const auto flags = input.take<uint8_t>();
  const auto delta = static_cast<int16_t>(input.take<uint16_t>());
  const auto length = input.take<uint16_t>();
  const auto bias = static_cast<int8_t>(input.take<uint8_t>());
  // Often it is what was asked for.
  const uint64_t size = length == 0 ? std::min(to.length, kMaxPayload) : length;
  chunk(to, flags, 1,
        Message().number(to.offset + static_cast<uint64_t>(int64_t{delta})).fill(size), bias);
}

void Conversation::hole_chunk() {
  Input& input = script_.input;
  const Request to = which();
  const auto flags = input.take<uint8_t>();
  const auto delta = static_cast<int16_t>(input.take<uint16_t>());
  const auto length = input.take<uint32_t>();
  chunk(to, flags, 2,
        Message()
            .number(to.offset + static_cast<uint64_t>(int64_t{delta}))
            .number(length == 0 ? to.length : length));
}

void Conversation::extents_chunk() {
  Input& input = script_.input;
  const Request to = which();
  const auto flags = input.take<uint8_t>();
  Message payload;
  payload.number(uint32_t{input.take<uint8_t>()} + 1);
  const auto bias = static_cast<int8_t>(input.take<uint8_t>());
  for (unsigned left = input.take<uint8_t>() % 20; left > 0; --left) {
    payload.number(input.take<uint32_t>());
    payload.number(uint32_t{input.take<uint8_t>()});
  }
  chunk(to, flags, 5, payload, bias);
}

void Conversation::error_chunk() {
  Input& input = script_.input;
  const Request to = which();
  const auto flags = input.take<uint8_t>();
  const auto type = static_cast<uint16_t>(0x8000 + input.take<uint8_t>() % 4);
  const uint32_t error = error_of(input.take<uint8_t>());
  const auto announced = input.take<uint16_t>();
  chunk(to, flags, type,
        Message().number(error).number(announced).raw(input.bytes(input.take<uint8_t>())));
}

void Conversation::any_chunk() {
  Input& input = script_.input;
  const Request to = which();
  const auto flags = input.take<uint8_t>();
  const auto type = input.take<uint16_t>();
  const auto bias = static_cast<int8_t>(input.take<uint8_t>());
  chunk(to, flags, type, Message().raw(input.bytes(input.take<uint8_t>())), bias);
}

}  // namespace minivmm::nbd
