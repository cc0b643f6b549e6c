// encode_check: what a GPU does of a prompt for klt caches, against the oracles over the host's memory
// (tests/device/), on random rows of several shapes, with times; exit code 0 if all is within rounding.
#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <string_view>

#include "device/host_device.h"
#include "device/library.h"
#include "kernels/bf16.h"
#include "kernels/half.h"
#include "kv/klt/cuda/klt_codec.h"
#include "kv/klt/klt_page.h"

namespace narrows::testing {
namespace {

using namespace device;

struct Shape {
  int64_t n_head, n_head_kv, head_dim, n;  ///< n: tokens
  double rate;
};

class Check {
 public:
  Check(std::shared_ptr<Device> device, std::unique_ptr<Stream> stream)
      : device_(std::move(device)), stream_(std::move(stream)) {}
  bool run(const Shape& s);

 private:
  template <class T>
  T* send(const std::vector<T>& x) {
    Buffer& b = buffers_.emplace_back();
    const auto bytes = static_cast<int64_t>(std::max<size_t>(1, x.size()) * sizeof(T));
    stream_->fail(device_->grow(b, bytes, "a check"));
    if (stream_->ok() && !x.empty())
      stream_->upload(b.data(), x.data(), static_cast<int64_t>(x.size() * sizeof(T)));
    return b.data<T>();
  }
  template <class T>
  std::vector<T> fetch(const T* p, size_t n) {
    std::vector<T> x(n);
    stream_->download(x.data(), p, static_cast<int64_t>(n * sizeof(T)));
    return x;
  }
  std::vector<float> random(int64_t n, double size = 1) {
    std::normal_distribution<double> normal(0, size);
    std::vector<float> x(static_cast<size_t>(n));
    for (float& y : x) y = static_cast<float>(normal(engine_));
    return x;
  }
  void say(const char* what, double worst, double allowed, double ms) {
    const bool good = worst <= allowed && stream_->ok();
    fmt::print("  {:<34} {:.2e} of {:.0e}, {:.3f} ms{}\n", what, worst, allowed, ms, good ? "" : "  WRONG");
    good_ = good_ && good;
  }
  template <class Args>
  double time(int (*Api::*function)(int, const Args*, void*), const Args& args) {
    stream_->op(function, args);
    stream_->wait();
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < 10; ++i) stream_->op(function, args);
    stream_->wait();
    const std::chrono::duration<double, std::milli> ms = std::chrono::steady_clock::now() - begin;
    return ms.count() / 10;
  }
  void moments(const char* what, MomentsArgs a, const std::vector<float>& x, bool bf16, int64_t n_read);
  void shares(const Shape& s, const std::vector<float>& k);
  void encode(const Shape& s, const std::vector<float>& k, const std::vector<float>& v);
  KltTransform transform(int64_t width, int64_t block, double rate);

  std::shared_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  std::vector<Buffer> buffers_;
  std::mt19937 engine_{1};
  bool good_ = true;
};

/// Rows beyond the last are NaN: nothing may read them.
void Check::moments(const char* what, MomentsArgs a, const std::vector<float>& x, bool bf16, int64_t n_read) {
  std::vector<uint16_t> halves;
  for (const float y : x) halves.push_back(kernels::float_to_bf16(y));
  const auto w = static_cast<size_t>(a.width), m = static_cast<size_t>(a.n_matrix);
  std::vector<double> sum(m * w, 1), square(m * w * w, 2);
  std::vector<float> centre(m * w);
  a.x_is_bf16 = bf16 ? 1 : 0;
  a.n = n_read;
  MomentsArgs there = a, here = a;
  there.x = bf16 ? static_cast<const void*>(send(halves)) : send(x);
  there.sum = send(sum);
  there.moments = send(square);
  there.centre = a.makes_centre != 0 ? send(centre) : nullptr;
  there.workspace = send(std::vector<float>(
      static_cast<size_t>(moments_bytes(a.n, a.n_sub, a.n_matrix, a.width)) / sizeof(float)));
  stream_->op(&Api::moments, there);
  const auto got_sum = fetch(there.sum, sum.size()), got = fetch(there.moments, square.size());
  here.x = bf16 ? static_cast<const void*>(halves.data()) : x.data();
  here.sum = sum.data();
  here.moments = square.data();
  here.centre = a.makes_centre != 0 ? centre.data() : nullptr;
  host_api().moments(0, &here, nullptr);
  double worst = 0, largest = 1;
  for (size_t i = 0; i < got.size(); ++i) {
    worst = std::max(worst, std::fabs(got[i] - square[i]));
    largest = std::max(largest, std::fabs(square[i]));
    if (!std::isfinite(got[i])) worst = std::numeric_limits<double>::infinity();
  }
  for (size_t i = 0; i < sum.size(); ++i)
    worst = std::max(worst, std::fabs(got_sum[i] - sum[i]) / static_cast<double>(n_read));
  say(what, worst / largest, 1e-5, time(&Api::moments, there));
}

void Check::shares(const Shape& s, const std::vector<float>& k) {
  constexpr int64_t kSink = 16;
  const int64_t width = s.n_head_kv * s.head_dim, n_page = s.n / 64;
  std::vector<float> rope(static_cast<size_t>((s.n + kSink) * s.head_dim));
  for (int64_t p = 0; p < s.n + kSink; ++p) {
    for (int64_t i = 0; i < s.head_dim / 2; ++i) {
      const double angle = static_cast<double>(p) *
                           std::pow(1e4, -2.0 * static_cast<double>(i) / static_cast<double>(s.head_dim));
      rope[static_cast<size_t>(p * s.head_dim + 2 * i)] = static_cast<float>(std::cos(angle));
      rope[static_cast<size_t>(p * s.head_dim + 2 * i + 1)] = static_cast<float>(std::sin(angle));
    }
  }
  const std::vector<float> sinks = random(kSink * width, 2);
  std::vector<uint16_t> samples;
  for (const float x : random((s.n + 15) / 16 * s.n_head * s.head_dim, 2))
    samples.push_back(kernels::float_to_half(x));
  std::vector<float> share(static_cast<size_t>(n_page * s.n_head_kv * 64), -1.0F);
  KltSharesArgs a{};
  a.ld = width;
  a.n_token = s.n;
  a.position = kSink;
  a.n_head = static_cast<int32_t>(s.n_head);
  a.n_head_kv = static_cast<int32_t>(s.n_head_kv);
  a.head_dim = static_cast<int32_t>(s.head_dim);
  a.n_sink = kSink;
  a.n_after = 63;
  a.n_page = static_cast<int32_t>(n_page);
  a.scale = 0.2F;
  KltSharesArgs there = a, here = a;
  there.keys = send(k);
  there.sinks = send(sinks);
  there.samples = send(samples);
  there.rope = send(rope);
  there.share = send(share);
  stream_->op(&Api::klt_shares, there);
  const auto got = fetch(there.share, share.size());
  here.keys = k.data();
  here.sinks = sinks.data();
  here.samples = samples.data();
  here.rope = rope.data();
  here.share = share.data();
  host_api().klt_shares(0, &here, nullptr);
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i)
    worst = std::max(worst, std::isfinite(got[i]) ? std::fabs(double{got[i]} - double{share[i]}) : 1e9);
  say("shares of attention", worst, 1e-3, time(&Api::klt_shares, there));
}

KltTransform Check::transform(int64_t width, int64_t block, double rate) {
  CentredMoments sums(width);
  std::vector<float> rows = random(2 * width * width);
  for (size_t i = 0; i < rows.size(); ++i)
    rows[i] *=
        std::exp2(-6.0F * static_cast<float>(i % static_cast<size_t>(block)) / static_cast<float>(block));
  sums.add(rows.data(), width, 2 * width);
  std::vector<double> weight(static_cast<size_t>(width * block));
  for (int64_t i = 0; i < width; ++i) weight[static_cast<size_t>(i * block + i % block)] = 1;
  return *make_klt_transform(*make_klt_basis(sums, weight, block), rate);
}

void Check::encode(const Shape& s, const std::vector<float>& k, const std::vector<float>& v) {
  const int64_t heads = heads_of_part(s.n_head_kv, s.head_dim), w = heads * s.head_dim,
                n_part = s.n_head_kv / heads;
  const int64_t n_page = s.n / 64;
  auto parts = std::make_shared<std::vector<KltPart>>();
  int64_t at = kPageHeader;
  for (int64_t p = 0; p < n_part; ++p) {
    parts->emplace_back(p * w, transform(w, s.head_dim, s.rate), transform(w, s.head_dim, s.rate + 1), 32,
                        at);
    at = parts->back().layout().end();
  }
  KvProfile profile = *KvProfile::parse("klt");
  profile.key_rate = s.rate;
  profile.value_rate = s.rate + 1;
  const int64_t page_bytes = klt_device_page_bytes(profile, {s.n_head, s.n_head_kv, s.head_dim, 1});
  const auto codec = KltCodec::make(parts, page_bytes, device_, *stream_);
  if (!codec.ok()) return say(codec.status().message().c_str(), 1, 0, 0);
  KltForward forward;
  stream_->fail(forward.set(**codec, device_, *stream_));
  std::vector<uint64_t> anchors(static_cast<size_t>(n_page), 0);
  if (!anchors.empty()) anchors.back() = uint64_t{1} << 63 | 5;
  std::vector<int32_t> table(static_cast<size_t>(n_page)), bad(table.size());
  for (int64_t p = 0; p < n_page; ++p) table[static_cast<size_t>(p)] = static_cast<int32_t>(n_page - 1 - p);
  std::vector<char> pages(static_cast<size_t>(n_page * page_bytes), -1);
  KltEncodeArgs a{};
  a.k = send(k);
  a.v = send(v);
  a.ld = s.n_head_kv * s.head_dim;
  a.anchors = send(anchors);
  a.parts = (*codec)->parts();
  a.project = forward.project();
  a.bits = forward.bits();
  a.n_part = static_cast<int32_t>(n_part);
  a.width = static_cast<int32_t>(w);
  a.n_page = static_cast<int32_t>(n_page);
  a.pool = send(pages);
  a.table = send(table);
  a.page_bytes = page_bytes;
  a.bad = send(bad);
  stream_->op(&Api::klt_encode, a);
  const auto got = fetch(static_cast<const char*>(a.pool), pages.size());
  const auto got_bad = fetch(a.bad, bad.size());
  // The CPU's pages, turned, and those that come back.
  int64_t n_other = 0, n_back = 0, n_bad = 0;
  std::vector<std::byte> page(static_cast<size_t>(at)), turned(static_cast<size_t>(page_bytes)),
      back(page.size());
  std::vector<KltEncoder> encoders;
  for (const KltPart& part : *parts) encoders.emplace_back(part);
  for (int64_t p = 0; p < n_page; ++p) {
    std::memcpy(page.data(), &anchors[static_cast<size_t>(p)], sizeof(uint64_t));
    bool stored = true;
    for (KltEncoder& e : encoders)
      stored = e.encode(k.data() + p * 64 * a.ld, v.data() + p * 64 * a.ld, a.ld,
                        anchors[static_cast<size_t>(p)], page.data()) &&
               stored;
    n_bad += stored != (got_bad[static_cast<size_t>(p)] == 0);
    if (!stored) continue;
    (*codec)->convert(page.data(), turned.data());
    const char* there = got.data() + table[static_cast<size_t>(p)] * page_bytes;
    for (int64_t i = 0; i < page_bytes; ++i)
      n_other += static_cast<char>(turned[static_cast<size_t>(i)]) != there[i];
    (*codec)->restore(turned.data(), back.data());
    n_back += page != back;
  }
  say("pages: share of other bytes", static_cast<double>(n_other) / static_cast<double>(got.size()), 2e-3,
      time(&Api::klt_encode, a));
  say("pages that are told to be bad", static_cast<double>(n_bad), 0, 0);
  say("pages that do not come back", static_cast<double>(n_back), 0, 0);
}

bool Check::run(const Shape& s) {
  const int64_t width = s.n_head_kv * s.head_dim, heads = heads_of_part(s.n_head_kv, s.head_dim);
  const int64_t group = s.n_head / s.n_head_kv, width_q = s.n_head * s.head_dim;
  fmt::print("{} tokens, {} / {} heads of {}, {} bits\n", s.n, s.n_head, s.n_head_kv, s.head_dim, s.rate);
  // One row more than is asked for.
  std::vector<float> k = random((s.n + 1) * width), v = random((s.n + 1) * width),
                     q = random((s.n + 1) * width_q);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::fill(k.end() - width, k.end(), nan);
  std::fill(v.end() - width, v.end(), nan);
  std::fill(q.end() - width_q, q.end(), nan);
  MomentsArgs a{};
  a.ld = width;
  a.stride = a.width = static_cast<int32_t>(heads * s.head_dim);
  a.n_matrix = static_cast<int32_t>(s.n_head_kv / heads);
  a.n_sub = 1;
  a.makes_centre = 1;
  moments("moments of keys", a, k, false, s.n);
  a.ld = width_q;
  a.stride = group * s.head_dim;
  a.width = static_cast<int32_t>(s.head_dim);
  a.n_matrix = static_cast<int32_t>(s.n_head_kv);
  a.n_sub = static_cast<int32_t>(group);
  a.makes_centre = 0;
  a.accumulate = 1;
  moments("moments of queries", a, q, false, std::min<int64_t>(s.n, 1000));
  moments("moments of the output's matrix", a, q, true, std::min<int64_t>(s.n, 700));
  shares(s, k);
  encode(s, k, v);
  k[static_cast<size_t>(70 * width)] = nan;
  k[static_cast<size_t>(width + 1)] = 1e30F;
  encode(s, k, v);
  buffers_.clear();
  const Status status = stream_->take_error();
  if (!status.ok()) fmt::print("{}\n", status.message());
  return good_ && status.ok();
}

/// small: without the shape whose oracle takes seconds.
int check(bool small) {
  const auto api = load_library();
  if (!api.ok()) return fmt::print("{}\n", api.status().message()), 1;
  auto device = Device::open(**api, 0);
  if (!device.ok()) return fmt::print("{}\n", device.status().message()), 1;
  auto stream = Stream::create(*device);
  if (!stream.ok()) return fmt::print("{}\n", stream.status().message()), 1;
  fmt::print("{}\n", (*device)->name());
  bool good = true;
  for (const Shape& s : {Shape{32, 8, 128, 4096, 2}, Shape{9, 3, 64, 1100, 2}, Shape{8, 1, 128, 300, 1},
                         Shape{16, 8, 64, 200, 0.25}, Shape{2, 2, 128, 129, 6}}) {
    if (small && s.n > 2000) continue;
    Check one(*device, std::move(*stream));
    good = one.run(s) && good;
    stream = Stream::create(*device);
    if (!stream.ok()) return 1;
  }
  fmt::print("{}\n", good ? "all within rounding" : "WRONG");
  return good ? 0 : 1;
}

}  // namespace
}  // namespace narrows::testing

/// `host`: on the device that is the host's memory, oracle against oracle; `small`: for a memory checker.
int main(int argc, char** argv) {
  const std::string_view how = argc > 1 ? argv[1] : "";
  std::optional<narrows::testing::WithHostDevice> host;
  if (how == "host") host.emplace();
  return narrows::testing::check(how != "");
}
