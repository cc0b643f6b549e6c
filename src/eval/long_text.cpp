// All sessions take each token in one pass over the weights.
#include "eval/long_text.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <random>

#include "eval/divergence.h"
#include "narrows/sampling.h"

namespace narrows {

namespace {

constexpr size_t kBlock = 25;
constexpr int kDraws = 10000;

/// Of positions begin to end of all samples.
std::vector<double> block_means(std::span<const std::vector<double>> kl, size_t begin, size_t end) {
  std::vector<double> means;
  for (const std::vector<double>& x : kl) {
    for (size_t at = begin; at < end; at += kBlock) {
      const size_t stop = std::min(at + kBlock, end);
      double sum = 0;
      for (size_t i = at; i < stop; ++i) sum += x[i];
      means.push_back(sum / static_cast<double>(stop - at));
    }
  }
  return means;
}

double mean(const std::vector<double>& x) {
  double sum = 0;
  for (const double y : x) sum += y;
  return x.empty() ? 0 : sum / static_cast<double>(x.size());
}

double ratio(double last, double first) { return first > 0 ? last / first : 1; }

/// What a profile's predictions were at each position of each text.
struct Record {
  std::vector<std::vector<double>> kl;
  std::vector<std::vector<char>> same;
};

LongTextRow row_of(const std::string& kv, const Record& record, const LongTextOptions& options) {
  LongTextRow row;
  row.kv = kv;
  const int64_t n_bucket = std::min(options.n_bucket, options.tokens);
  const auto n_sample = static_cast<double>(record.kl.size());
  for (int64_t b = 0; b < n_bucket; ++b) {
    LongTextBucket bucket;
    bucket.from = b * options.tokens / n_bucket;
    bucket.to = (b + 1) * options.tokens / n_bucket;
    const double n = static_cast<double>(bucket.to - bucket.from) * n_sample;
    for (size_t s = 0; s < record.kl.size(); ++s) {
      for (auto i = static_cast<size_t>(bucket.from); i < static_cast<size_t>(bucket.to); ++i) {
        bucket.kl += record.kl[s][i] / n;
        bucket.top1 += record.same[s][i] / n;
      }
    }
    const double share = n / (static_cast<double>(options.tokens) * n_sample);
    row.kl_mean += bucket.kl * share;
    row.top1 += bucket.top1 * share;
    row.buckets.push_back(bucket);
  }
  row.drift = drift_of(record.kl);
  return row;
}

/// The part of the text that sample s goes on from, with the text's first token, a BOS it may be, before it.
std::vector<Token> prompt_of(std::span<const Token> text, const LongTextOptions& options, int64_t s) {
  const auto n = static_cast<size_t>(options.context);
  const size_t first = static_cast<size_t>(s) * (text.size() - n) / static_cast<size_t>(options.samples);
  std::vector<Token> prompt(text.begin() + static_cast<std::ptrdiff_t>(first),
                            text.begin() + static_cast<std::ptrdiff_t>(first + n));
  prompt.front() = text.front();
  return prompt;
}

class Writer {
 public:
  Writer(std::shared_ptr<const Model> model, const LongTextOptions& options)
      : model_(std::move(model)), options_(options) {}

  Status open() {
    std::vector<KvProfile> profiles = {KvProfile{}};
    profiles.insert(profiles.end(), options_.profiles.begin(), options_.profiles.end());
    for (const KvProfile& p : profiles) {
      SessionOptions so;
      so.kv = p;
      so.n_ctx = options_.context + options_.tokens;
      so.n_threads = options_.n_threads;
      so.prompt = options_.prompt;
      if (p.takes_basis()) so.basis_path = options_.basis_path;
      Result<std::unique_ptr<Session>> made = Session::create(model_, so);
      if (!made.ok()) return made.status();
      sessions_.push_back(std::move(*made));
      pointers_.push_back(sessions_.back().get());
    }
    if (pointers_.size() > static_cast<size_t>(DecodeBatch::kMaxSessions)) {
      return {StatusCode::invalid_argument,
              fmt::format("{} profiles at once are too many, give {} at most", options_.profiles.size(),
                          DecodeBatch::kMaxSessions - 1)};
    }
    Result<std::unique_ptr<DecodeBatch>> batch =
        DecodeBatch::create(model_, static_cast<int>(pointers_.size()), pointers_.front()->n_threads());
    if (!batch.ok()) return batch.status();
    batch_ = std::move(*batch);
    lp_.assign(pointers_.size(), std::vector<double>(static_cast<size_t>(model_->info().n_vocab)));
    for (Token t = 0; t < model_->tokenizer().n_vocab(); ++t) {
      if (model_->tokenizer().is_end(t)) no_end_.push_back({t, -std::numeric_limits<float>::infinity()});
    }
    return {};
  }

  /// One text; records[p] of profile p (without f16) get a row each.
  Status write(std::span<const Token> prompt, int64_t sample, std::vector<Record>& records, std::string& text,
               const ProgressFn& progress) {
    for (Session* s : pointers_) s->reset();
    const auto reading = [&](double done) { return !progress || progress(0.5 * done); };
    if (Status s = Session::prefill_together(pointers_, prompt, reading); !s.ok()) return s;
    SamplerOptions so;
    so.temperature = options_.temperature;
    so.seed = options_.seed + static_cast<uint32_t>(sample);
    so.logit_bias = no_end_;
    Result<std::unique_ptr<Sampler>> sampler = Sampler::create(so, &model_->tokenizer());
    if (!sampler.ok()) return sampler.status();
    for (Record& r : records) {
      r.kl.emplace_back();
      r.same.emplace_back();
    }
    std::vector<Token> written;
    for (int64_t i = 0; i < options_.tokens; ++i) {
      const Result<Token> token = (*sampler)->sample(pointers_.front()->logits());
      if (!token.ok()) return token.status();
      (*sampler)->accept(*token);
      written.push_back(*token);
      if (Status s = step(*token, records); !s.ok()) return s;
      const double part = static_cast<double>(i + 1) / static_cast<double>(options_.tokens);
      if (progress && !progress(0.5 + 0.5 * part)) return {StatusCode::cancelled, "eval was cancelled"};
    }
    Utf8Stream stream;
    text = stream.push(model_->tokenizer().decode(written));
    text += stream.flush();
    return {};
  }

 private:
  Status step(Token token, std::vector<Record>& records) {
    const std::vector<Token> tokens(pointers_.size(), token);
    std::vector<Status> each(pointers_.size());
    if (Status s = batch_->decode(pointers_, tokens, each); !s.ok()) return s;
    for (Status& s : each) {
      if (!s.ok()) return s;
    }
    std::vector<char> finite(pointers_.size());
    batch_->for_each(static_cast<int64_t>(pointers_.size()), [&](int64_t p) {
      const auto at = static_cast<size_t>(p);
      finite[at] = log_softmax(pointers_[at]->logits(), lp_[at]);
    });
    for (size_t p = 0; p < pointers_.size(); ++p) {
      if (!finite[p]) return logits_not_finite("--kv " + pointers_[p]->profile().name);
      if (p == 0) continue;
      records[p - 1].kl.back().push_back(divergence(lp_[0], lp_[p]));
      records[p - 1].same.back().push_back(same_top(lp_[0], lp_[p]) ? 1 : 0);
    }
    return {};
  }

  std::shared_ptr<const Model> model_;
  const LongTextOptions& options_;
  std::vector<std::unique_ptr<Session>> sessions_;
  std::vector<Session*> pointers_;  ///< f16 first
  std::unique_ptr<DecodeBatch> batch_;
  std::vector<std::vector<double>> lp_;
  std::vector<LogitBias> no_end_;
};

}  // namespace

Drift drift_of(std::span<const std::vector<double>> kl) {
  Drift d;
  if (kl.empty() || kl.front().size() < 2) return d;
  const size_t n = kl.front().size();
  const std::vector<double> first = block_means(kl, 0, n / 2), last = block_means(kl, n / 2, n);
  d.ratio = ratio(mean(last), mean(first));
  std::mt19937 random(1);
  const auto draw = [&](const std::vector<double>& blocks) {
    double sum = 0;
    for (size_t i = 0; i < blocks.size(); ++i) sum += blocks[random() % blocks.size()];
    return sum;
  };
  std::vector<double> ratios;
  const double sizes = static_cast<double>(first.size()) / static_cast<double>(last.size());
  for (int i = 0; i < kDraws; ++i) {
    const double a = draw(first);
    ratios.push_back(sizes * ratio(draw(last), a));
  }
  std::sort(ratios.begin(), ratios.end());
  d.low = ratios[kDraws / 40];
  d.high = ratios[kDraws - 1 - kDraws / 40];
  return d;
}

Result<LongText> measure_long_text(const std::shared_ptr<const Model>& model, std::span<const Token> text,
                                   const LongTextOptions& options, const ProgressFn& progress) {
  if (options.context < 1 || options.tokens < 2 || options.samples < 1 || options.n_bucket < 1 ||
      options.profiles.empty()) {
    return Status(StatusCode::invalid_argument,
                  "a long text needs a context, two tokens to write, a sample and a profile at least");
  }
  if (static_cast<int64_t>(text.size()) < options.context + options.samples - 1) {
    return Status(
        StatusCode::invalid_argument,
        fmt::format("the text has {} tokens but {} samples after {} tokens need {}; give a longer text "
                    "or lower --context",
                    text.size(), options.samples, options.context, options.context + options.samples - 1));
  }
  Writer writer(model, options);
  if (Status s = writer.open(); !s.ok()) return s;
  LongText result;
  std::vector<Record> records(options.profiles.size());
  for (int64_t s = 0; s < options.samples; ++s) {
    const auto part = [&](double done) {
      return !progress || progress((static_cast<double>(s) + done) / static_cast<double>(options.samples));
    };
    if (Status st = writer.write(prompt_of(text, options, s), s, records, result.texts.emplace_back(), part);
        !st.ok()) {
      return st;
    }
  }
  for (size_t p = 0; p < records.size(); ++p)
    result.rows.push_back(row_of(options.profiles[p].name, records[p], options));
  return result;
}

}  // namespace narrows
