// Random tensors, their types and the file around them, by ggml's own writer.
#include "support/tiny_model.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <random>

#include "temp_dir.h"
#include "text/tiny_vocabulary.h"

namespace narrows::testing {

namespace {

struct FreeGguf {
  void operator()(gguf_context* g) const { gguf_free(g); }
};
struct FreeGgml {
  void operator()(ggml_context* g) const { ggml_free(g); }
};
using Gguf = std::unique_ptr<gguf_context, FreeGguf>;

[[noreturn]] void give_up(const std::string& what) {
  (void)std::fprintf(stderr, "tiny_model: %s\n", what.c_str());
  std::abort();
}

/// The vocabulary as tests/text writes it. Made once: it is the same in every file.
const gguf_context* vocabulary() {
  static const Gguf file = [] {
    const TempDir dir;
    if (!TinyVocabulary{}.write(dir.path("v.gguf"))) give_up("the vocabulary cannot be written");
    return Gguf(gguf_init_from_file(dir.path("v.gguf").c_str(), {.no_alloc = true, .ctx = nullptr}));
  }();
  return file.get();
}

/// Draws the tensors of one model, each from its own seed, so that a change of one leaves the others alone.
class Draw {
 public:
  explicit Draw(const TinyModel& m) : m_(m) {}

  void matrix(const std::string& name, int64_t n_in, int64_t n_out, double deviation) {
    TinyTensor t{name, m_.type, {n_in, n_out}, normal(name, n_in * n_out, 0, deviation)};
    for (const auto& [part, type] : m_.types) {
      if (name.find(part) != std::string::npos) t.type = type;
    }
    all_.push_back(std::move(t));
  }
  /// One matrix for each expert.
  void experts(const std::string& name, int64_t n_in, int64_t n_out, int64_t n, double deviation) {
    matrix(name, n_in, n_out * n, deviation);
    all_.back().ne = {n_in, n_out, n};
  }
  void floats(const std::string& name, int64_t n_in, int64_t n_out, double deviation) {
    all_.push_back({name, GGML_TYPE_F32, {n_in, n_out}, normal(name, n_in * n_out, 0, deviation)});
  }
  void vector(const std::string& name, int64_t n, double mean, double deviation) {
    all_.push_back({name, GGML_TYPE_F32, {n}, normal(name, n, mean, deviation)});
  }
  void add(TinyTensor t) { all_.push_back(std::move(t)); }

  /// The last matrix becomes the product of two thin ones, of the same variance.
  void lower_rank(int64_t rank) {
    TinyTensor& t = all_.back();
    const int64_t n_in = t.ne[0], n_out = t.ne[1];
    double square = 0;
    for (const float x : t.data) square += static_cast<double>(x) * static_cast<double>(x);
    const double deviation = std::sqrt(square / static_cast<double>(n_in * n_out * rank));
    const std::vector<float> a = normal(t.name + " a", n_out * rank, 0, deviation);
    const std::vector<float> b = normal(t.name + " b", rank * n_in, 0, 1);
    for (int64_t r = 0; r < n_out; ++r) {
      for (int64_t c = 0; c < n_in; ++c) {
        float sum = 0;
        for (int64_t i = 0; i < rank; ++i)
          sum += a[static_cast<size_t>(r * rank + i)] * b[static_cast<size_t>(i * n_in + c)];
        t.data[static_cast<size_t>(r * n_in + c)] = sum;
      }
    }
  }

  std::vector<TinyTensor> take() { return std::move(all_); }

 private:
  std::vector<float> normal(const std::string& name, int64_t n, double mean, double deviation) const {
    uint32_t hash = 2166136261U ^ m_.seed;
    for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 16777619U;
    std::mt19937 random(hash);
    std::normal_distribution<double> draw(mean, deviation);
    std::vector<float> x(static_cast<size_t>(n));
    for (float& y : x) y = static_cast<float>(draw(random));
    return x;
  }

  const TinyModel& m_;
  std::vector<TinyTensor> all_;
};

double by_width(double gain, int64_t n_in) { return gain / std::sqrt(static_cast<double>(n_in)); }

bool is_one_of(const TinyModel& m, std::initializer_list<const char*> architectures) {
  return std::any_of(architectures.begin(), architectures.end(),
                     [&](const char* a) { return m.architecture == a; });
}

/// Routers are float32 in files of all types. Their outputs are far enough apart that rounding changes the
/// choice of an expert seldom, and then of one that weighs little.
void draw_experts(Draw& draw, const TinyModel& m, const std::string& p) {
  draw.floats(p + "ffn_gate_inp.weight", m.n_embd, m.n_expert, by_width(m.router_gain, m.n_embd));
  if (m.joined_experts) {
    draw.experts(p + "ffn_gate_up_exps.weight", m.n_embd, 2 * m.n_ff, m.n_expert, by_width(1.5, m.n_embd));
  } else {
    draw.experts(p + "ffn_gate_exps.weight", m.n_embd, m.n_ff, m.n_expert, by_width(1.5, m.n_embd));
    draw.experts(p + "ffn_up_exps.weight", m.n_embd, m.n_ff, m.n_expert, by_width(1.5, m.n_embd));
  }
  draw.experts(p + "ffn_down_exps.weight", m.n_ff, m.n_embd, m.n_expert, by_width(1, m.n_ff));
  if (m.architecture == "gpt-oss") {
    draw.vector(p + "ffn_gate_inp.bias", m.n_expert, 0, 0.5);
    draw.floats(p + "ffn_gate_exps.bias", m.n_ff, m.n_expert, 0.5);
    draw.floats(p + "ffn_up_exps.bias", m.n_ff, m.n_expert, 0.5);
    draw.floats(p + "ffn_down_exps.bias", m.n_embd, m.n_expert, 0.3);
  }
  if (m.n_shared_ff == 0) return;
  draw.matrix(p + "ffn_gate_shexp.weight", m.n_embd, m.n_shared_ff, by_width(1.5, m.n_embd));
  draw.matrix(p + "ffn_up_shexp.weight", m.n_embd, m.n_shared_ff, by_width(1.5, m.n_embd));
  draw.matrix(p + "ffn_down_shexp.weight", m.n_shared_ff, m.n_embd, by_width(1, m.n_shared_ff));
  if (m.architecture == "qwen2moe" || m.is_hybrid())
    draw.vector(p + "ffn_gate_inp_shexp.weight", m.n_embd, 0, by_width(2, m.n_embd));
}

void draw_ffn(Draw& draw, const TinyModel& m, const std::string& p) {
  if (m.n_expert > 0) return draw_experts(draw, m, p);
  const bool gate_in_up = is_one_of(m, {"phi3", "glm4"});
  if (!gate_in_up) draw.matrix(p + "ffn_gate.weight", m.n_embd, m.n_ff, by_width(1.5, m.n_embd));
  draw.matrix(p + "ffn_up.weight", m.n_embd, gate_in_up ? 2 * m.n_ff : m.n_ff, by_width(1.5, m.n_embd));
  draw.matrix(p + "ffn_down.weight", m.n_ff, m.n_embd, by_width(1, m.n_ff));
  if (m.other_bias) {
    draw.vector(p + "attn_output.bias", m.n_embd, 0, 0.3);
    draw.vector(p + "ffn_gate.bias", m.n_ff, 0, 0.3);
    draw.vector(p + "ffn_up.bias", m.n_ff, 0, 0.3);
    draw.vector(p + "ffn_down.bias", m.n_embd, 0, 0.3);
  }
}

/// Decays from some tokens to some hundred, as trained models have them.
void draw_delta_net(Draw& draw, const TinyModel& m, const std::string& p) {
  const int64_t k = m.delta_head_k * m.delta_dim, v = m.delta_head_v * m.delta_dim;
  if (m.old_tensors) {
    draw.matrix(p + "ssm_in.weight", m.n_embd, 2 * k + 2 * v, by_width(1.5, m.n_embd));
  } else {
    draw.matrix(p + "attn_qkv.weight", m.n_embd, 2 * k + v, by_width(1.5, m.n_embd));
    draw.matrix(p + "attn_gate.weight", m.n_embd, v, by_width(1.5, m.n_embd));
  }
  if (m.architecture == "qwen3next") {
    draw.matrix(p + "ssm_ba.weight", m.n_embd, 2 * m.delta_head_v, by_width(1.5, m.n_embd));
  } else {
    draw.matrix(p + "ssm_beta.weight", m.n_embd, m.delta_head_v, by_width(1.5, m.n_embd));
    draw.matrix(p + "ssm_alpha.weight", m.n_embd, m.delta_head_v, by_width(1.5, m.n_embd));
  }
  draw.floats(p + "ssm_conv1d.weight", m.n_conv, 2 * k + v, by_width(1.5, m.n_conv));
  draw.vector(p + "ssm_a", m.delta_head_v, -0.15, 0.04);
  draw.vector(p + "ssm_dt.bias", m.delta_head_v, -2, 1);
  draw.vector(p + "ssm_norm.weight", m.delta_dim, 1, 0.2);
  draw.matrix(p + "ssm_out.weight", v, m.n_embd, by_width(1.5, v));
}

void draw_layer(Draw& draw, const TinyModel& m, int64_t i) {
  const std::string p = "blk." + std::to_string(i) + ".";
  const int64_t d_q = m.n_head * m.head_dim;
  const bool bias = m.qkv_bias || is_one_of(m, {"qwen2", "qwen2moe", "gpt-oss"});
  const bool pre_norms = !is_one_of(m, {"olmo2"}), post_norms = is_one_of(m, {"gemma3", "glm4", "olmo2"});
  if (pre_norms) draw.vector(p + "attn_norm.weight", m.n_embd, 1, 0.2);
  if (m.is_recurrent(i)) {
    draw_delta_net(draw, m, p);
    draw.vector(p + "post_attention_norm.weight", m.n_embd, 1, 0.2);
    return draw_ffn(draw, m, p);
  }
  if (is_one_of(m, {"phi3"})) {
    draw.matrix(p + "attn_qkv.weight", m.n_embd, d_q + 2 * m.width(), by_width(1.4, m.n_embd));
  } else {
    draw.matrix(p + "attn_q.weight", m.n_embd, m.is_hybrid() ? 2 * d_q : d_q, by_width(1.5, m.n_embd));
    draw.matrix(p + "attn_k.weight", m.n_embd, m.width(), by_width(1.5, m.n_embd));
    if (m.key_rank > 0) draw.lower_rank(m.key_rank);
    draw.matrix(p + "attn_v.weight", m.n_embd, m.width(), by_width(1, m.n_embd));
  }
  if (bias) draw.vector(p + "attn_q.bias", d_q, 0, 0.5);
  if (bias) draw.vector(p + "attn_k.bias", m.width(), 0, 2);  // Qwen2's key biases are large
  if (bias) draw.vector(p + "attn_v.bias", m.width(), 0, 0.5);
  if (m.architecture.starts_with("qwen3") || m.architecture == "gemma3") {
    draw.vector(p + "attn_q_norm.weight", m.head_dim, 1.5, 0.3);
    draw.vector(p + "attn_k_norm.weight", m.head_dim, 1.5, 0.3);
  }
  if (is_one_of(m, {"olmo2", "olmoe"})) {
    draw.vector(p + "attn_q_norm.weight", d_q, 1.5, 0.3);
    draw.vector(p + "attn_k_norm.weight", m.width(), 1.5, 0.3);
  }
  draw.matrix(p + "attn_output.weight", d_q, m.n_embd, by_width(1, d_q));
  if (post_norms) {
    draw.vector(p + "post_attention_norm.weight", m.n_embd, 1, 0.2);
    draw.vector(p + "post_ffw_norm.weight", m.n_embd, 1, 0.2);
  }
  if (m.architecture == "gpt-oss") {
    draw.vector(p + "attn_sinks.weight", m.n_head, 1, 1.5);
    draw.vector(p + "attn_output.bias", m.n_embd, 0, 0.3);
    draw.vector(p + "post_attention_norm.weight", m.n_embd, 1, 0.2);
  } else if (m.is_hybrid()) {
    draw.vector(p + "post_attention_norm.weight", m.n_embd, 1, 0.2);
  } else if (pre_norms) {
    draw.vector(p + "ffn_norm.weight", m.n_embd, 1, 0.2);
  }
  draw_ffn(draw, m, p);
}

/// What a layer that predicts further tokens has beside an attending layer's.
void draw_nextn(Draw& draw, const TinyModel& m, int64_t i) {
  draw_layer(draw, m, i);
  const std::string p = "blk." + std::to_string(i) + ".nextn.";
  draw.matrix(p + "eh_proj.weight", 2 * m.n_embd, m.n_embd, by_width(1, 2 * m.n_embd));
  for (const char* name : {"enorm.weight", "hnorm.weight", "shared_head_norm.weight"})
    draw.vector(p + name, m.n_embd, 1, 0.2);
}

Gguf metadata_of(const TinyModel& m) {
  Gguf file(gguf_init_empty());
  gguf_set_kv(file.get(), vocabulary());
  const auto key = [&](const char* name) { return m.architecture + "." + name; };
  const auto count = [&](const char* name, int64_t n) {
    gguf_set_val_u32(file.get(), key(name).c_str(), static_cast<uint32_t>(n));
  };
  const auto real = [&](const char* name, double x) {
    gguf_set_val_f32(file.get(), key(name).c_str(), static_cast<float>(x));
  };
  gguf_set_val_str(file.get(), "general.architecture", m.architecture.c_str());
  gguf_set_val_str(file.get(), "general.name", "tiny");
  count("block_count", m.n_layer + m.n_nextn);
  if (m.n_nextn > 0) count("nextn_predict_layers", m.n_nextn);
  if (m.is_hybrid()) {
    count("ssm.conv_kernel", m.n_conv);
    count("ssm.state_size", m.delta_dim);
    count("ssm.group_count", m.delta_head_k);
    count("ssm.time_step_rank", m.delta_head_v);
    count("ssm.inner_size", m.delta_head_v * m.delta_dim);
    count("full_attention_interval", m.attends_in);
    if (!m.recurrent.empty()) {
      std::vector<int8_t> each(m.recurrent.begin(), m.recurrent.end());
      each.resize(static_cast<size_t>(m.n_layer + m.n_nextn));
      gguf_set_arr_data(file.get(), key("attention.recurrent_layers").c_str(), GGUF_TYPE_BOOL, each.data(),
                        each.size());
    }
    const auto n_rot = static_cast<int32_t>(m.n_rot > 0 ? m.n_rot : m.head_dim);
    std::vector<int32_t> sections = m.sections;
    const int32_t half = n_rot / 2;
    if (sections.empty()) sections = {(half + 2) / 3, (half + 1) / 3, half / 3, 0};
    gguf_set_arr_data(file.get(), key("rope.dimension_sections").c_str(), GGUF_TYPE_INT32, sections.data(),
                      sections.size());
  }
  count("embedding_length", m.n_embd);
  count("feed_forward_length", m.n_ff);
  count("attention.head_count", m.n_head);
  count("attention.head_count_kv", m.n_head_kv);
  count("context_length", m.n_ctx);
  if (m.n_expert > 0) count("expert_count", m.n_expert);
  if (m.n_used > 0) count("expert_used_count", m.n_used);
  if (m.n_expert > 0) count("expert_feed_forward_length", m.n_ff);
  if (m.n_shared_ff > 0) count("expert_shared_feed_forward_length", m.n_shared_ff);
  real("attention.layer_norm_rms_epsilon", 1e-5);
  if (m.head_dim * m.n_head != m.n_embd) {
    count("attention.key_length", m.head_dim);
    count("attention.value_length", m.head_dim);
  }
  real("rope.freq_base", m.freq_base);
  if (m.n_rot > 0) count("rope.dimension_count", m.n_rot);
  if (!m.rope_scaling.empty())
    gguf_set_val_str(file.get(), key("rope.scaling.type").c_str(), m.rope_scaling.c_str());
  if (m.rope_factor > 0) real("rope.scaling.factor", m.rope_factor);
  if (m.n_ctx_orig > 0) count("rope.scaling.original_context_length", m.n_ctx_orig);
  if (m.window > 0) count("attention.sliding_window", m.window);
  if (m.window_period > 0) count("attention.sliding_window_pattern", m.window_period);
  if (!m.windows.empty()) {
    const std::vector<int8_t> each(m.windows.begin(), m.windows.end());
    gguf_set_arr_data(file.get(), key("attention.sliding_window_pattern").c_str(), GGUF_TYPE_BOOL,
                      each.data(), each.size());
  }
  if (m.attention_scale > 0) real("attention.scale", m.attention_scale);
  if (m.temperature > 0) real("attention.temperature_scale", m.temperature);
  if (m.embedding_scale > 0) real("embedding_scale", m.embedding_scale);
  if (m.residual_scale > 0) real("residual_scale", m.residual_scale);
  if (m.logit_scale > 0) real("logit_scale", m.logit_scale);
  if (m.no_rope) gguf_set_val_bool(file.get(), key("rope.scaling.finetuned").c_str(), false);
  if (m.edit_metadata) m.edit_metadata(file.get());
  return file;
}

/// The tensor's bytes in the file; zeros in types without numbers of ours (integers, float64).
std::string encode(const TinyTensor& t) {
  if (t.data.empty()) return {};
  const int64_t n_row = static_cast<int64_t>(t.data.size()) / t.ne[0];
  std::string out(static_cast<size_t>(n_row) * ggml_row_size(t.type, t.ne[0]), '\0');
  const bool has_codec = t.type == GGML_TYPE_F32 || ggml_get_type_traits(t.type)->from_float_ref != nullptr;
  if (has_codec) ggml_quantize_chunk(t.type, t.data.data(), out.data(), 0, n_row, t.ne[0], nullptr);
  return out;
}

}  // namespace

bool TinyModel::is_hybrid() const { return is_one_of(*this, {"qwen35", "qwen35moe", "qwen3next"}); }

bool TinyModel::is_recurrent(int64_t layer) const {
  if (!is_hybrid() || layer >= n_layer) return false;
  return recurrent.empty() ? (layer + 1) % attends_in != 0 : recurrent[static_cast<size_t>(layer)];
}

std::vector<TinyTensor> TinyModel::tensors() const {
  Draw draw(*this);
  draw.matrix("token_embd.weight", n_embd, kTinyVocab, tied_output ? 0.3 : 1.0);
  for (int64_t i = 0; i < n_layer; ++i) draw_layer(draw, *this, i);
  for (int64_t i = n_layer; i < n_layer + n_nextn; ++i) draw_nextn(draw, *this, i);
  draw.vector("output_norm.weight", n_embd, 1, 0.2);
  if (!tied_output) draw.matrix("output.weight", n_embd, kTinyVocab, by_width(2.5, n_embd));
  if (output_bias) draw.vector("output.bias", kTinyVocab, 0, 0.5);
  for (const auto& [name, factors] : {std::pair("rope_freqs.weight", &rope_factors),
                                      {"rope_factors_short.weight", &short_factors},
                                      {"rope_factors_long.weight", &long_factors}}) {
    if (!factors->empty()) draw.add({name, GGML_TYPE_F32, {static_cast<int64_t>(factors->size())}, *factors});
  }
  std::vector<TinyTensor> all = draw.take();
  if (edit_tensors) edit_tensors(all);
  return all;
}

std::string TinyModel::bytes() const {
  const Gguf file = metadata_of(*this);
  const std::vector<TinyTensor> all = tensors();
  const std::unique_ptr<ggml_context, FreeGgml> shapes(ggml_init(
      {.mem_size = (all.size() + 1) * ggml_tensor_overhead(), .mem_buffer = nullptr, .no_alloc = true}));
  for (const TinyTensor& t : all) {
    ggml_tensor* shape = ggml_new_tensor(shapes.get(), t.type, static_cast<int>(t.ne.size()), t.ne.data());
    ggml_set_name(shape, t.name.c_str());
    gguf_add_tensor(file.get(), shape);
  }
  std::string out(gguf_get_meta_size(file.get()), '\0');
  gguf_get_meta_data(file.get(), out.data());
  for (const TinyTensor& t : all) {
    out += encode(t);
    out.resize(GGML_PAD(out.size(), gguf_get_alignment(file.get())));
  }
  return out;
}

std::string TinyModel::write(const std::string& path) const {
  const std::string content = bytes();
  std::ofstream out(path, std::ios::binary);
  out.write(content.data(), static_cast<std::streamsize>(content.size()));
  out.close();
  if (!out) give_up(path + " cannot be written");
  return path;
}

std::vector<std::string> write_split(const TinyModel& model, const std::string& prefix, size_t n) {
  const size_t n_tensor = model.tensors().size();
  std::vector<std::string> paths;
  for (size_t part = 0; part < n; ++part) {
    TinyModel m = model;
    m.edit_metadata = [&](gguf_context* g) {
      if (model.edit_metadata) model.edit_metadata(g);
      gguf_set_val_u16(g, "split.no", static_cast<uint16_t>(part));
      gguf_set_val_u16(g, "split.count", static_cast<uint16_t>(n));
      gguf_set_val_i32(g, "split.tensors.count", static_cast<int32_t>(n_tensor));
    };
    m.edit_tensors = [&](std::vector<TinyTensor>& all) {
      if (model.edit_tensors) model.edit_tensors(all);
      std::vector<TinyTensor> kept;
      for (size_t i = part; i < all.size(); i += n) kept.push_back(std::move(all[i]));
      all = std::move(kept);
    };
    char ending[40];
    (void)std::snprintf(ending, sizeof(ending), "-%05zu-of-%05zu.gguf", part + 1, n);
    paths.push_back(m.write(prefix + ending));
  }
  return paths;
}

TinyTensor& tensor(std::vector<TinyTensor>& all, const std::string& name) {
  for (TinyTensor& t : all) {
    if (t.name == name) return t;
  }
  give_up("there is no tensor " + name);
}

std::vector<Token> random_tokens(int64_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<Token> tokens(static_cast<size_t>(n));
  for (Token& t : tokens) t = static_cast<Token>(random() % 256);
  return tokens;
}

}  // namespace narrows::testing
