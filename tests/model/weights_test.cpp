// ModelWeights: which matrices are joined, rows of q and k reordered where the file rotates neighbours, the
// embedding read row by row in every type, norms and biases as float32.
#include "model/weights.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "support/compare.h"
#include "support/refusal.h"
#include "support/tiny_cases.h"
#include "temp_dir.h"
#include "text/llama_log.h"

namespace narrows::testing {
namespace {

struct Loaded {
  TempDir dir;
  std::unique_ptr<ModelWeights> weights;

  explicit Loaded(const TinyModel& m, bool repack = false, int64_t read_bytes = int64_t{4} << 20) {
    silence_llama_log();
    auto file = GgufFile::open(m.write(dir.path("m.gguf")));
    EXPECT_TRUE(file.ok());
    const auto spec = read_spec(*file);
    EXPECT_TRUE(spec.ok());
    auto made = ModelWeights::load(std::move(*file), *spec, {.repack = repack}, read_bytes);
    EXPECT_TRUE(made.ok()) << made.status().message();
    weights = std::move(*made);
  }
  const LayerWeights& layer(int64_t i) const { return weights->layer(i); }
};

std::vector<float> floats(const Matrix& w) {
  std::vector<float> x(static_cast<size_t>(w.n_in * w.n_out));
  w.unpack(0, w.n_out, x.data());
  return x;
}
std::vector<float> floats(const float* x, int64_t n) { return {x, x + n}; }

/// Row r of a matrix of n_in columns.
std::vector<float> row(const std::vector<float>& matrix, int64_t n_in, int64_t r) {
  return {matrix.begin() + r * n_in, matrix.begin() + (r + 1) * n_in};
}

TEST(Weights, JoinWhatHasOneType) {
  const Loaded plain{TinyModel()};
  ASSERT_TRUE(plain.layer(0).wqkv);
  EXPECT_FALSE(plain.layer(0).wq);
  EXPECT_EQ(plain.layer(0).bqkv, nullptr);
  ASSERT_TRUE(plain.layer(1).gate_up);
  EXPECT_FALSE(plain.layer(1).gate);
  EXPECT_EQ(plain.layer(0).q_norm, nullptr);

  TinyModel m;
  m.architecture = "qwen2";
  const Loaded biased(m);
  ASSERT_NE(biased.layer(0).bqkv, nullptr);
  EXPECT_EQ(biased.layer(0).wqkv.n_out, 64 + 2 * 32);

  m.types = {{"blk.0.attn_v", GGML_TYPE_F16}, {"blk.1.ffn_up", GGML_TYPE_F16}};
  const Loaded mixed(m);
  EXPECT_FALSE(mixed.layer(0).wqkv);
  EXPECT_EQ(mixed.layer(0).bqkv, nullptr);
  for (const Matrix* w : {&mixed.layer(0).wq, &mixed.layer(0).wk, &mixed.layer(0).wv}) ASSERT_TRUE(*w);
  for (const float* b : {mixed.layer(0).bq, mixed.layer(0).bk, mixed.layer(0).bv}) ASSERT_NE(b, nullptr);
  EXPECT_EQ(mixed.layer(0).wv.type, TensorType::f16);
  EXPECT_TRUE(mixed.layer(1).wqkv);
  EXPECT_TRUE(mixed.layer(0).gate_up);
  EXPECT_FALSE(mixed.layer(1).gate_up);
  EXPECT_TRUE(mixed.layer(1).gate);
  EXPECT_TRUE(mixed.layer(1).up);

  TinyModel other;
  other.other_bias = true;
  const Loaded with_bias(other);
  EXPECT_FALSE(with_bias.layer(0).gate_up);  // the joined product has no place for biases
  EXPECT_NE(with_bias.layer(0).b_gate, nullptr);
  EXPECT_NE(with_bias.layer(0).bo, nullptr);

  // One bias of three.
  TinyModel one;
  one.architecture = "qwen2";
  one.edit_tensors = [](std::vector<TinyTensor>& all) {
    std::erase_if(all, [](const TinyTensor& t) {
      return t.name == "blk.0.attn_q.bias" || t.name == "blk.0.attn_v.bias";
    });
  };
  const Loaded odd(one);
  EXPECT_FALSE(odd.layer(0).wqkv);
  EXPECT_EQ(odd.layer(0).bq, nullptr);
  EXPECT_NE(odd.layer(0).bk, nullptr);
}

TEST(Weights, JoinedRowsStandInOrder) {
  TinyModel m;
  m.architecture = "qwen2";  // halves already: nothing moves
  const Loaded loaded(m);
  auto all = m.tensors();
  const std::vector<float> qkv = floats(loaded.layer(1).wqkv);
  std::vector<float> want, want_bias;
  for (const char* which : {"q", "k", "v"}) {
    const auto& w = tensor(all, std::string("blk.1.attn_") + which + ".weight").data;
    want.insert(want.end(), w.begin(), w.end());
    const auto& b = tensor(all, std::string("blk.1.attn_") + which + ".bias").data;
    want_bias.insert(want_bias.end(), b.begin(), b.end());
  }
  EXPECT_EQ(max_difference(qkv, want), 0);
  EXPECT_EQ(max_difference(floats(loaded.layer(1).bqkv, 128), want_bias), 0);
  std::vector<float> gate_up = tensor(all, "blk.1.ffn_gate.weight").data;
  const auto& up = tensor(all, "blk.1.ffn_up.weight").data;
  gate_up.insert(gate_up.end(), up.begin(), up.end());
  EXPECT_EQ(max_difference(floats(loaded.layer(1).gate_up), gate_up), 0);
  EXPECT_EQ(max_difference(floats(loaded.layer(1).wo), tensor(all, "blk.1.attn_output.weight").data), 0);
  EXPECT_EQ(max_difference(floats(loaded.layer(0).attn_norm, 64), tensor(all, "blk.0.attn_norm.weight").data),
            0);
}

// In the file of a llama pair i is rows 2i, 2i + 1 of a head; here it is i, i + n_rot / 2.
TEST(Weights, NeighboursBecomeHalves) {
  for (const int64_t n_rot : {16, 8}) {
    TinyModel m;
    m.qkv_bias = true;
    m.n_rot = n_rot;
    const Loaded loaded(m);
    auto all = m.tensors();
    const std::vector<float> qkv = floats(loaded.layer(0).wqkv), bias = floats(loaded.layer(0).bqkv, 128);
    const auto source = [&](int64_t r) {  // of row r within a head
      if (r >= n_rot) return r;
      return r < n_rot / 2 ? 2 * r : 2 * (r - n_rot / 2) + 1;
    };
    int64_t out = 0;
    for (const char* which : {"q", "k", "v"}) {
      const auto& w = tensor(all, std::string("blk.0.attn_") + which + ".weight").data;
      const auto& b = tensor(all, std::string("blk.0.attn_") + which + ".bias").data;
      for (int64_t r = 0; r < static_cast<int64_t>(b.size()); ++r, ++out) {
        const int64_t from = *which == 'v' ? r : r / 16 * 16 + source(r % 16);
        ASSERT_EQ(row(qkv, 64, out), row(w, 64, from)) << which << " " << r << " rotating " << n_rot;
        ASSERT_EQ(bias[static_cast<size_t>(out)], b[static_cast<size_t>(from)]);
      }
    }
  }
}

TEST(Weights, EmbeddingRowsOfEveryType) {
  for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0,
                               GGML_TYPE_Q4_1, GGML_TYPE_Q5_1, GGML_TYPE_Q4_K, GGML_TYPE_Q6_K}) {
    TinyModel m;
    m.n_embd = 256;
    m.head_dim = 64;
    m.types = {{"token_embd", type}};
    const Loaded loaded(m, true);
    auto all = m.tensors();
    const std::vector<float>& want = tensor(all, "token_embd.weight").data;
    const std::vector<Token> tokens = {0, 257, 17, 17, 255};
    std::vector<float> got(tokens.size() * 256);
    ASSERT_TRUE(loaded.weights->embed(tokens, got.data()).ok());
    // Rounding of the type: a share of the row's range (about 6) by its bits.
    const double step = type == GGML_TYPE_F32                                                       ? 1e-9
                        : type == GGML_TYPE_F16 || type == GGML_TYPE_BF16 || type == GGML_TYPE_Q8_0 ? 0.05
                        : type == GGML_TYPE_Q6_K || type == GGML_TYPE_Q5_1                          ? 0.2
                                                                                                    : 0.6;
    for (size_t i = 0; i < tokens.size(); ++i) {
      EXPECT_LT(max_difference(std::span(got).subspan(i * 256, 256), row(want, 256, tokens[i])), step)
          << ggml_type_name(type) << " token " << tokens[i];
    }
  }
}

// An expert's matrices are its slice of the file's tensors, gate and up joined where they have one type.
TEST(Weights, ExpertsAreSlices) {
  TinyModel m;
  m.architecture = "qwen3moe";
  m.n_ff = 32;
  m.n_expert = 5;
  m.n_used = 2;
  const auto slice = [](const TinyTensor& t, int64_t e) {
    const int64_t n = t.ne[0] * t.ne[1];
    return std::vector<float>(t.data.begin() + e * n, t.data.begin() + (e + 1) * n);
  };
  const Loaded loaded(m);
  auto all = m.tensors();
  EXPECT_EQ(max_difference(floats(loaded.layer(1).router), tensor(all, "blk.1.ffn_gate_inp.weight").data), 0);
  ASSERT_EQ(loaded.layer(1).experts.size(), 5U);
  EXPECT_FALSE(loaded.layer(1).gate_up);
  EXPECT_FALSE(loaded.layer(1).down);
  for (int64_t e = 0; e < 5; ++e) {
    const ExpertWeights& w = loaded.layer(1).experts[static_cast<size_t>(e)];
    std::vector<float> gate_up = slice(tensor(all, "blk.1.ffn_gate_exps.weight"), e);
    const std::vector<float> up = slice(tensor(all, "blk.1.ffn_up_exps.weight"), e);
    gate_up.insert(gate_up.end(), up.begin(), up.end());
    EXPECT_EQ(max_difference(floats(w.gate_up), gate_up), 0) << e;
    EXPECT_EQ(max_difference(floats(w.down), slice(tensor(all, "blk.1.ffn_down_exps.weight"), e)), 0) << e;
  }
  m.types = {{"ffn_up_exps", GGML_TYPE_Q8_0}, {"ffn_gate_exps", GGML_TYPE_Q4_0}};
  const Loaded mixed(m, true), plain(m, false);
  for (size_t e = 0; e < 5; ++e) {
    const ExpertWeights &tiles = mixed.layer(0).experts[e], &rows = plain.layer(0).experts[e];
    EXPECT_FALSE(tiles.gate_up);
    for (const auto& [a, b] : {std::pair(&tiles.gate, &rows.gate), std::pair(&tiles.up, &rows.up)}) {
      EXPECT_TRUE(a->tiles);
      EXPECT_FALSE(b->tiles);
      EXPECT_EQ(max_difference(floats(*a), floats(*b)), 0);
    }
  }
}

// Any run of rows, across the borders of joined matrices.
TinyModel hybrid(const std::string& architecture) {
  TinyModel m;
  m.architecture = architecture;
  if (architecture == "qwen35") return m;
  m.n_expert = m.n_used = 2;
  m.n_shared_ff = 32;
  return m;
}

/// Rows of a tensor of the file.
std::vector<float> rows_of(std::vector<TinyTensor> all, const std::string& name, int64_t first, int64_t n) {
  const TinyTensor& t = tensor(all, name);
  return {t.data.begin() + first * t.ne[0], t.data.begin() + (first + n) * t.ne[0]};
}

// q of all heads, k, v, then the gates, which the file has behind each head's q.
TEST(Weights, GatesStandBehindTheOthers) {
  const TinyModel m = hybrid("qwen35");
  for (const bool apart : {false, true}) {
    TinyModel of_types = m;
    if (apart) of_types.types = {{"attn_v", GGML_TYPE_F16}};
    const Loaded loaded(of_types);
    const LayerWeights& l = loaded.layer(1);
    std::vector<float> want_q, want_gate;
    for (int64_t h = 0; h < 4; ++h) {
      for (const auto& [to, at] : {std::pair(&want_q, int64_t{0}), {&want_gate, int64_t{16}}}) {
        const auto rows = rows_of(m.tensors(), "blk.1.attn_q.weight", 32 * h + at, 16);
        to->insert(to->end(), rows.begin(), rows.end());
      }
    }
    EXPECT_EQ(static_cast<bool>(l.wgate), apart);
    std::vector<float> all = floats(l.wqkv ? l.wqkv : l.wq);
    EXPECT_EQ(std::vector<float>(all.begin(), all.begin() + 64 * 64), want_q);
    EXPECT_EQ(apart ? floats(l.wgate) : std::vector<float>(all.end() - 64 * 64, all.end()), want_gate);
  }
}

// Both ways in which files have a DeltaNet layer's matrices become one order of rows.
TEST(Weights, DeltaNetRowsStandInOneOrder) {
  const Loaded plain(hybrid("qwen35"));
  const TinyModel m = hybrid("qwen35");
  std::vector<float> want;
  for (const auto& [name, n] :
       {std::pair("attn_qkv", 128), {"attn_gate", 64}, {"ssm_beta", 4}, {"ssm_alpha", 4}}) {
    const auto rows = rows_of(m.tensors(), std::string("blk.0.") + name + ".weight", 0, n);
    want.insert(want.end(), rows.begin(), rows.end());
  }
  EXPECT_EQ(floats(plain.layer(0).delta_in[0]), want);
  EXPECT_FALSE(plain.layer(0).delta_in[1]);
  EXPECT_FALSE(plain.layer(1).delta_in[0]);
  // The convolution's oldest tokens first.
  std::vector<TinyTensor> all = m.tensors();
  const TinyTensor& conv = tensor(all, "blk.0.ssm_conv1d.weight");
  for (int64_t c = 0; c < 128; ++c) {
    for (int64_t j = 0; j < 4; ++j)
      ASSERT_EQ(plain.layer(0).conv[j * 128 + c], conv.data[static_cast<size_t>(c * 4 + j)]);
  }

  TinyModel old = hybrid("qwen3next");
  old.old_tensors = true;
  const Loaded grouped(old);
  want.clear();
  const auto add = [&](const std::string& name, int64_t first, int64_t n) {
    const auto rows = rows_of(old.tensors(), "blk.0." + name + ".weight", first, n);
    want.insert(want.end(), rows.begin(), rows.end());
  };
  // Two key heads of 16, each with two value heads: q 16, k 16, v 32, gate 32.
  for (const auto& [at, n] : {std::pair(0, 16), {16, 16}, {32, 32}, {64, 32}}) {
    for (const int64_t head : {0, 1}) add("ssm_in", head * 96 + at, n);
  }
  for (const int64_t at : {0, 2}) {
    for (const int64_t head : {0, 1}) add("ssm_ba", head * 4 + at, 2);
  }
  EXPECT_EQ(floats(grouped.layer(0).delta_in[0]), want);

  TinyModel mixed = hybrid("qwen35");
  mixed.types = {{"attn_gate", GGML_TYPE_F16}};
  const Loaded apart(mixed);
  EXPECT_EQ(apart.layer(0).delta_in[0].n_out, 128);
  EXPECT_EQ(apart.layer(0).delta_in[1].n_out, 64);
  EXPECT_EQ(apart.layer(0).delta_in[2].n_out, 8);
}

TEST(Weights, GateAndUpOfExpertsMayBeOneTensor) {
  TinyModel m = hybrid("qwen35moe");
  m.joined_experts = true;
  const Loaded loaded(m);
  for (int64_t e = 0; e < 2; ++e) {
    EXPECT_EQ(floats(loaded.layer(0).experts[static_cast<size_t>(e)].gate_up),
              rows_of(m.tensors(), "blk.0.ffn_gate_up_exps.weight", e * 256, 256));
  }
}

TEST(Weights, StatesThatWouldGrowAreRefused) {
  TinyModel m = hybrid("qwen35");
  m.edit_tensors = [](std::vector<TinyTensor>& all) { tensor(all, "blk.0.ssm_a").data[1] = 0.1F; };
  const TempDir dir;
  auto file = GgufFile::open(m.write(dir.path("m.gguf")));
  ASSERT_TRUE(file.ok());
  const auto spec = read_spec(*file);
  ASSERT_TRUE(spec.ok());
  auto made = ModelWeights::load(std::move(*file), *spec, {});
  expect_refusal(made.status(), StatusCode::invalid_file, {"blk.0.ssm_a", "above 0"});
}

// Tensors of layers that predict further tokens are left; others that nobody knows are still refused.
TEST(Weights, LayersThatPredictFurtherTokensAreLeft) {
  TinyModel m = hybrid("qwen35");
  m.n_nextn = 1;
  const Loaded loaded(m);
  EXPECT_EQ(loaded.weights->spec().n_layer(), 2);
  TinyModel none = hybrid("qwen35");
  EXPECT_EQ(loaded.weights->allocated_bytes(), Loaded(none).weights->allocated_bytes());
}

TEST(Weights, AnyRowsAreUnpacked) {
  for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0}) {
    TinyModel m;
    m.type = type;
    const Loaded loaded(m, true);
    for (const Matrix* w : {&loaded.layer(1).wqkv, &loaded.layer(0).wo, &loaded.layer(1).gate_up}) {
      EXPECT_EQ(w->tiles.has_value(), type == GGML_TYPE_Q8_0);
      const std::vector<float> all = floats(*w);
      for (const auto& [first, n] : {std::pair{int64_t{0}, w->n_out},
                                     {w->n_out - 1, int64_t{1}},
                                     {int64_t{61}, std::min<int64_t>(w->n_out - 61, 70)},
                                     {int64_t{3}, int64_t{0}}}) {
        std::vector<float> got(static_cast<size_t>(n * w->n_in));
        w->unpack(first, n, got.data());
        ASSERT_EQ(
            max_difference(got, std::span(all).subspan(static_cast<size_t>(first * w->n_in), got.size())), 0)
            << w->name << " from " << first;
      }
    }
  }
}

TEST(Weights, EmbedRefusesTokensThatDoNotExist) {
  const Loaded loaded{TinyModel()};
  std::vector<float> out(64);
  for (const Token bad : {-1, static_cast<Token>(kTinyVocab), std::numeric_limits<Token>::max(),
                          std::numeric_limits<Token>::min()}) {
    expect_refusal(loaded.weights->embed({&bad, 1}, out.data()), StatusCode::invalid_argument,
                   {std::to_string(bad), "258"});
  }
}

TEST(Weights, TakeTheMemoryOfTheFileAndNotTheEmbeddingTwice) {
  for (const bool tied : {false, true}) {
    TinyModel m;
    m.tied_output = tied;
    m.type = GGML_TYPE_Q8_0;
    const Loaded loaded(m);
    int64_t bytes = 0;
    for (const TinyTensor& t : m.tensors()) {
      const bool used = tied || t.name != "token_embd.weight";  // rows of it are read from the file
      bytes += used ? static_cast<int64_t>(ggml_row_size(t.type, static_cast<int64_t>(t.data.size()))) : 0;
    }
    EXPECT_GE(loaded.weights->allocated_bytes(), bytes);
    EXPECT_LT(loaded.weights->allocated_bytes(), bytes + bytes / 8);
  }
}

TEST(Weights, PackedOnesTakeTheBytesOfTheFile) {
  for (const TinyCase& c : quantised_cases()) {
    const Loaded packed(c.model, true), plain(c.model, false);
    // Tiles of 16 rows: the vocabulary is 258, and 64 bytes between matrices.
    EXPECT_LE(packed.weights->allocated_bytes(), plain.weights->allocated_bytes() * 17 / 16 + 64 * 16)
        << c.name;
    EXPECT_FALSE(plain.layer(0).wo.tiles);
  }
}

// Joined, reordered, of mixed types, read from the file in one piece or in small ones: row by row what the
// same matrices are as rows of the file.
void expect_rows_of_the_file(int64_t read_bytes) {
  for (const TinyCase& c : quantised_cases()) {
    const Loaded packed(c.model, true, read_bytes), plain(c.model, false);
    int n_packed = 0;
    for (int64_t i = -1; i < c.model.n_layer; ++i) {
      const std::vector<const Matrix*> output = {&packed.weights->output()},
                                       rows = {&plain.weights->output()};
      const auto got = i < 0 ? output : packed.layer(i).matrices(),
                 want = i < 0 ? rows : plain.layer(i).matrices();
      for (const Matrix* w : got) {
        if (!w->tiles) continue;
        ++n_packed;
        const auto same =
            std::find_if(want.begin(), want.end(), [&](const Matrix* p) { return p->name == w->name; });
        ASSERT_NE(same, want.end());
        // Gate and up may be joined where they have no tiles alone.
        ASSERT_LE(w->n_out, (*same)->n_out);
        const std::vector<float> numbers = floats(**same);
        ASSERT_EQ(
            max_difference(floats(*w), std::span(numbers).first(static_cast<size_t>(w->n_in * w->n_out))), 0)
            << c.name << ", " << w->name;
      }
    }
    const bool has_packing = c.model.type != GGML_TYPE_F16 && c.model.type != GGML_TYPE_Q3_K;
    EXPECT_EQ(n_packed > 0, has_packing) << c.name;
  }
}

TEST(Weights, PackedRowsAreTheFiles) {
  expect_rows_of_the_file(int64_t{4} << 20);
  expect_rows_of_the_file(1);       // a tile of 16 rows at a time
  expect_rows_of_the_file(10'000);  // some tiles, the last time fewer
}

TEST(Weights, RopeFactorsReachTheTable) {
  TinyModel m;
  m.rope_factors = {1, 1, 1, 1, 2, 3, 4, 5};
  const Loaded loaded(m);
  EXPECT_EQ(loaded.weights->spec().ropes.front().freq_factors, m.rope_factors);
}

}  // namespace
}  // namespace narrows::testing
