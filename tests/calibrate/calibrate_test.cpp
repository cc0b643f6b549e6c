// Key statistics against sums computed here, bases that are bases, spectra of keys whose rank is known, and
// texts that are too short.
#include <gtest/gtest.h>

#include <Eigen/Dense>
#include <cmath>
#include <limits>

#include "calibrate/key_statistics.h"
#include "calibrate/spectrum.h"
#include "support/refusal.h"
#include "support/session.h"

namespace narrows::testing {
namespace {

constexpr int64_t kWidth = 32;

/// qwen2: its keys are not reordered at load, and have a mean.
TinyModel qwen2() {
  TinyModel m;
  m.architecture = "qwen2";
  m.n_layer = 3;
  m.n_ctx = 512;  // sequences are no longer than this
  return m;
}

const LoadedTiny& tiny() {
  static const LoadedTiny loaded(qwen2());
  return loaded;
}

/// Keys of layer 0 before RoPE [n, kWidth]: they depend on the token alone.
Eigen::MatrixXd first_layer_keys(const TinyModel& m, std::span<const Token> tokens) {
  std::vector<TinyTensor> all = m.tensors();
  const auto map = [&](const char* name, int64_t rows, int64_t columns) -> Eigen::MatrixXd {
    const std::vector<float>& data = tensor(all, name).data;
    return Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>(
               data.data(), rows, columns)
        .cast<double>();
  };
  const Eigen::MatrixXd embedding = map("token_embd.weight", kTinyVocab, m.n_embd);
  const Eigen::MatrixXd norm = map("blk.0.attn_norm.weight", 1, m.n_embd),
                        w = map("blk.0.attn_k.weight", kWidth, m.n_embd);
  Eigen::MatrixXd keys(static_cast<Eigen::Index>(tokens.size()), kWidth);
  for (Eigen::Index i = 0; i < keys.rows(); ++i) {
    const Eigen::RowVectorXd x = embedding.row(tokens[static_cast<size_t>(i)]);
    const double scale = 1 / std::sqrt(x.squaredNorm() / static_cast<double>(m.n_embd) + 1e-5);
    keys.row(i) = (scale * x.cwiseProduct(norm)) * w.transpose();
    if (m.architecture == "qwen2") keys.row(i) += map("blk.0.attn_k.bias", 1, kWidth);
  }
  return keys;
}

// --- moments
// ------------------------------------------------------------------------------------------------------

TEST(KeyMomentsOfText, AreTheSumsOverAllTokensButTheFirstOfEachSequence) {
  const auto text = random_tokens(1300);  // sequences of 512, 512 and 276 tokens
  auto moments = gather_key_moments(*tiny().model, text, 1);
  ASSERT_TRUE(moments.ok()) << moments.status().message();
  ASSERT_EQ(moments->size(), 3U);
  std::vector<Token> counted;
  for (size_t i = 0; i < text.size(); ++i) {
    if (i % 512 >= kSkipTokens) counted.push_back(text[i]);
  }
  for (const KeyMoments& m : *moments) EXPECT_EQ(m.n_tokens(), static_cast<int64_t>(counted.size()));
  const Eigen::MatrixXd keys = first_layer_keys(qwen2(), counted);
  const Eigen::MatrixXd second = keys.transpose() * keys;
  const Eigen::RowVectorXd sum = keys.colwise().sum();
  const KeyMoments& first = moments->front();
  for (int64_t i = 0; i < kWidth; ++i) {
    // float32 keys, summed in double: a rounding of each, which mostly cancels.
    EXPECT_NEAR(first.sum()[static_cast<size_t>(i)], sum(i), 1e-6 * keys.col(i).cwiseAbs().sum());
    for (int64_t j = 0; j < kWidth; ++j) {
      const double bound = 4e-6 * std::sqrt(second(i, i) * second(j, j));  // 256 products a float32 sum
      ASSERT_NEAR(first.moments()[static_cast<size_t>(i * kWidth + j)], second(i, j), bound) << i << " " << j;
    }
  }
}

TEST(KeyMomentsOfText, DoNotDependOnThreads) {
  const auto text = random_tokens(600);
  const auto one = gather_key_moments(*tiny().model, text, 1),
             two = gather_key_moments(*tiny().model, text, 2);
  ASSERT_TRUE(one.ok() && two.ok());
  for (size_t l = 0; l < 3; ++l) EXPECT_EQ((*one)[l].moments(), (*two)[l].moments());
}

TEST(KeyMomentsOfText, RefuseATextThatIsTooShort) {
  const int64_t least = 2 * kWidth + kSkipTokens;
  for (const int64_t n : {int64_t{0}, int64_t{1}, least - 1}) {
    const auto text = random_tokens(n);
    const std::vector<std::string> counts = {std::to_string(n) + " tokens", std::to_string(least)};
    expect_refusal(status_of(gather_key_moments(*tiny().model, text, 1)), StatusCode::invalid_argument,
                   counts);
    expect_refusal(status_of(calibrate(*tiny().model, text, "x", 1)), StatusCode::invalid_argument, counts);
    expect_refusal(status_of(key_spectrum(*tiny().model, text, 1)), StatusCode::invalid_argument, counts);
  }
  EXPECT_TRUE(gather_key_moments(*tiny().model, random_tokens(least), 1).ok());
}

TEST(KeyMomentsOfText, ReportProgressAndCanBeCancelled) {
  const auto text = random_tokens(1300);
  std::vector<double> seen;
  ASSERT_TRUE(gather_key_moments(*tiny().model, text, 1, [&](double done) {
                seen.push_back(done);
                return true;
              }).ok());
  EXPECT_TRUE(std::is_sorted(seen.begin(), seen.end()));
  EXPECT_EQ(seen.front(), 0);
  EXPECT_EQ(seen.back(), 1);
  for (const double limit : {0.0, 0.5}) {
    const auto stopped =
        gather_key_moments(*tiny().model, text, 1, [&](double done) { return done < limit; });
    EXPECT_EQ(static_cast<int>(stopped.status().code()), static_cast<int>(StatusCode::cancelled));
  }
}

TEST(KeyMomentsOfText, ThatAreNoNumbersNameTheLayer) {
  TinyModel m = qwen2();
  m.edit_tensors = [](std::vector<TinyTensor>& all) {
    tensor(all, "blk.1.attn_k.weight").data[7] = std::nanf("");
  };
  const LoadedTiny bad(m);
  const auto text = random_tokens(300);
  expect_refusal(status_of(calibrate(*bad.model, text, "x", 1)), StatusCode::non_finite, {"layer 1"});
  expect_refusal(status_of(key_spectrum(*bad.model, text, 1)), StatusCode::non_finite, {"layer 1"});
}

// --- bases
// --------------------------------------------------------------------------------------------------------

TEST(Basis, IsOrthonormalAndOfEigenvectors) {
  const auto text = random_tokens(1000);
  auto made = calibrate(*tiny().model, text, "two words", 1);
  ASSERT_TRUE(made.ok()) << made.status().message();
  EXPECT_EQ(made->fingerprint, tiny().model->info().fingerprint);
  EXPECT_EQ(made->made_from, "two words");
  EXPECT_EQ(made->n_tokens, 1000);
  ASSERT_EQ(made->layers.size(), 3U);
  const auto moments = gather_key_moments(*tiny().model, text, 1);
  for (size_t l = 0; l < 3; ++l) {
    const LayerBasis& basis = made->layers[l];
    ASSERT_EQ(basis.width, kWidth);
    ASSERT_EQ(basis.rank, kWidth);
    using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    const Eigen::MatrixXd u = Eigen::Map<const Matrix>(basis.u.data(), kWidth, kWidth).cast<double>();
    EXPECT_LT((u.transpose() * u - Eigen::MatrixXd::Identity(kWidth, kWidth)).cwiseAbs().maxCoeff(), 1e-6);
    const Eigen::MatrixXd m =
        Eigen::Map<const Eigen::MatrixXd>((*moments)[l].moments().data(), kWidth, kWidth);
    const double total = m.trace();
    double energy = 0;
    for (int64_t c = 0; c < kWidth; ++c) {
      const double share = static_cast<double>(basis.energy[static_cast<size_t>(c)]);
      EXPECT_GE(share, 0);
      if (c > 0) {
        EXPECT_LE(basis.energy[static_cast<size_t>(c)], basis.energy[static_cast<size_t>(c - 1)]);
      }
      EXPECT_LT((m * u.col(c) - share * total * u.col(c)).norm(), 1e-5 * total)
          << "layer " << l << " vector " << c;
      energy += share;
    }
    EXPECT_NEAR(energy, 1, 1e-5);
  }
}

TEST(Basis, SurvivesItsFile) {
  auto made = calibrate(*tiny().model, random_tokens(300), "a file", 1);
  ASSERT_TRUE(made.ok());
  const TempDir dir;
  const ModelInfo& info = tiny().model->info();
  ASSERT_OK(write_basis_file(dir.path("b.gguf"), *made, info));
  const auto read = read_basis_file(dir.path("b.gguf"), info);
  ASSERT_TRUE(read.ok()) << read.status().message();
  for (size_t l = 0; l < 3; ++l) {
    EXPECT_EQ((*read)->layers[l].u, made->layers[l].u);
    EXPECT_EQ((*read)->layers[l].energy, made->layers[l].energy);
  }
  EXPECT_EQ((*read)->made_from, "a file");
  EXPECT_EQ((*read)->n_tokens, 300);
}

// --- spectra
// ------------------------------------------------------------------------------------------------------

TEST(Spectrum, ShowsTheRankOfTheKeys) {
  for (const int64_t rank : {4, 8, 16}) {
    TinyModel m;  // llama: no bias, so the keys are W x with W of that rank
    m.key_rank = rank;
    const LoadedTiny loaded(m);
    const auto spectrum = key_spectrum(*loaded.model, random_tokens(600), 1);
    ASSERT_TRUE(spectrum.ok()) << spectrum.status().message();
    ASSERT_EQ(spectrum->size(), 2U);
    for (const LayerSpectrum& s : *spectrum) {
      const auto expect_share = [&](double share, int64_t coordinates) {
        if (coordinates >= rank) {
          EXPECT_NEAR(share, 1, 1e-6) << rank;
        } else {
          EXPECT_LT(share, 0.95) << rank;
        }
      };
      expect_share(s.share_8th, 4);
      expect_share(s.share_4th, 8);
      expect_share(s.share_half, 16);
    }
    EXPECT_EQ((*spectrum)[1].layer, 1);
  }
}

TEST(Spectrum, IsTheDirectOne) {
  const auto text = random_tokens(516);  // two sequences: 512 and 4, of which nothing counts
  const auto spectrum = key_spectrum(*tiny().model, text, 1);
  ASSERT_TRUE(spectrum.ok());
  const Eigen::MatrixXd keys = first_layer_keys(qwen2(), std::span(text).subspan(4, 508));
  const Eigen::RowVectorXd mean = keys.colwise().mean();
  const Eigen::MatrixXd centred = keys.rowwise() - mean;
  Eigen::VectorXd variance =
      Eigen::JacobiSVD<Eigen::MatrixXd>(centred).singularValues().array().square();  // descending
  const double total = variance.sum();
  const LayerSpectrum& first = spectrum->front();
  EXPECT_NEAR(first.share_8th, variance.head(4).sum() / total, 1e-5);
  EXPECT_NEAR(first.share_4th, variance.head(8).sum() / total, 1e-5);
  EXPECT_NEAR(first.share_half, variance.head(16).sum() / total, 1e-5);
  EXPECT_NEAR(first.mean_over_sd, mean.norm() / std::sqrt(total / 508), 1e-4);
  EXPECT_GT(first.mean_over_sd, 1);  // the bias of Qwen2
}

// --- text that the model writes
// -----------------------------------------------------------------------------------

TEST(OwnText, IsLongEnoughRepeatableAndWithoutEndTokens) {
  TinyModel m = qwen2();
  m.n_ctx = 64;  // several documents
  const LoadedTiny loaded(m);
  double last = 0;
  const auto text = write_own_text(loaded.model, 200, 1, [&](double done) {
    EXPECT_GE(done, last);
    last = done;
    return true;
  });
  ASSERT_TRUE(text.ok()) << text.status().message();
  EXPECT_EQ(text->size(), 200U);
  EXPECT_EQ(last, 1);
  for (const Token t : *text) {
    EXPECT_GE(t, 0);
    EXPECT_LT(t, kTinyVocab);
    EXPECT_FALSE(loaded.model->tokenizer().is_end(t));
  }
  EXPECT_EQ(*write_own_text(loaded.model, 200, 1), *text);
  std::vector<Token> sorted = *text;
  std::sort(sorted.begin(), sorted.end());
  EXPECT_GT(std::unique(sorted.begin(), sorted.end()) - sorted.begin(), 20);  // sampled, not stuck
  const auto stopped = write_own_text(loaded.model, 200, 1, [](double done) { return done < 0.1; });
  EXPECT_EQ(static_cast<int>(stopped.status().code()), static_cast<int>(StatusCode::cancelled));
}

}  // namespace
}  // namespace narrows::testing
