// What tensors a model of this spec has, by GGUF's names, and what matrices and vectors they become.
#include <fmt/format.h>

#include <algorithm>

#include "base/utf8.h"
#include "model/weight_loader.h"

namespace narrows {

/// The tensor of this name, checked; null if it is missing (an error unless optional). n_matrix: one for
/// each expert.
const TensorEntry* WeightLoader::take(const std::string& name, int64_t n_in, int64_t n_out, bool optional,
                                      int64_t n_matrix) {
  const TensorEntry* t = m_.file_.find(name);
  if (t == nullptr) {
    if (!optional) fail(bad(fmt::format("tensor {} is missing, get the file again", name)));
    return nullptr;
  }
  used_.insert(t->name);
  if (t->ne[0] != n_in || t->ne[1] != n_out || t->ne[2] != n_matrix || t->ne[3] != 1) {
    fail(bad(fmt::format("tensor {} is {} but should be [{}, {}{}]", name, describe_shape(*t), n_in, n_out,
                         n_matrix > 1 ? fmt::format(", {}", n_matrix) : "")));
    return nullptr;
  }
  if (!can_compute(t->type)) {
    fail({StatusCode::unsupported,
          fmt::format("{}: tensor {} is of type {}, which this build cannot compute with", m_.file_.path(),
                      name, type_name(t->type))});
    return nullptr;
  }
  return t;
}

void WeightLoader::declare_attention(int64_t i, LayerWeights& l) {
  const std::string p = fmt::format("blk.{}.", i);
  const AttentionSpec& a = spec_.layer(i).attention;
  const int64_t d_q = a.width_q(), d_kv = a.width_kv(), n_rot = spec_.rope_of(i).n_rot;
  const bool turn = spec_.rope_neighbours;
  if (spec_.layer(i).pre_norms) vector(&l.attn_norm, p + "attn_norm.weight", spec_.n_embd);
  const int64_t n_q = a.output_gate ? 2 * d_q : d_q;  // rows of the q tensor
  std::vector<Rows> qkv;
  if (m_.file_.find(p + "attn_qkv.weight") != nullptr && m_.file_.find(p + "attn_q.weight") == nullptr) {
    const TensorEntry* all = take(p + "attn_qkv.weight", spec_.n_embd, n_q + 2 * d_kv);
    if (all == nullptr) return;
    qkv = {Rows(all, 0, n_q), Rows(all, n_q, d_kv), Rows(all, n_q + d_kv, d_kv)};
  } else {
    for (const auto& [name, n] :
         {std::pair("attn_q.weight", n_q), {"attn_k.weight", d_kv}, {"attn_v.weight", d_kv}}) {
      if (const TensorEntry* t = take(p + name, spec_.n_embd, n)) qkv.emplace_back(t);
    }
    if (qkv.size() < 3) return;
  }
  if (a.output_gate) return declare_gated_qkv(i, l, qkv);
  Rows &q = qkv[0], &k = qkv[1], &v = qkv[2];
  q.reorder = k.reorder = turn;
  const TensorEntry* bq = take(p + "attn_q.bias", d_q, 1, true);
  const TensorEntry* bk = take(p + "attn_k.bias", d_kv, 1, true);
  const TensorEntry* bv = take(p + "attn_v.bias", d_kv, 1, true);
  const bool all_biases = bq != nullptr && bk != nullptr && bv != nullptr;
  const bool no_bias = bq == nullptr && bk == nullptr && bv == nullptr;
  const auto want = [&](Matrix* m, const float** b, const Rows& rows) {
    wanted_.push_back({m, b, {rows}, a.head_dim, n_rot});
  };
  const auto bias = [&](const float** b, const TensorEntry* t, bool reorder) {
    if (t != nullptr) want(nullptr, b, {t, reorder});
  };
  if (q.of->type == k.of->type && q.of->type == v.of->type && (all_biases || no_bias)) {
    wanted_.push_back({&l.wqkv, nullptr, qkv, a.head_dim, n_rot});
    if (all_biases) wanted_.push_back({nullptr, &l.bqkv, {{bq, turn}, {bk, turn}, bv}, a.head_dim, n_rot});
  } else {
    want(&l.wq, nullptr, q);
    want(&l.wk, nullptr, k);
    want(&l.wv, nullptr, v);
    bias(&l.bq, bq, turn);
    bias(&l.bk, bk, turn);
    bias(&l.bv, bv, false);
  }
  declare_rest_of_attention(i, l);
}

/// q of all heads, k, v, then the gates of all heads, which the file has head by head behind q.
void WeightLoader::declare_gated_qkv(int64_t i, LayerWeights& l, const std::vector<Rows>& qkv) {
  const AttentionSpec& a = spec_.layer(i).attention;
  const bool turn = spec_.rope_neighbours;
  std::vector<Rows> q, gate;
  for (int64_t h = 0; h < a.n_head; ++h) {
    const int64_t first = qkv[0].first + 2 * h * a.head_dim;
    q.emplace_back(qkv[0].of, first, a.head_dim);
    q.back().reorder = turn;
    gate.emplace_back(qkv[0].of, first + a.head_dim, a.head_dim);
  }
  std::vector<Rows> k = {qkv[1]}, v = {qkv[2]};
  k.front().reorder = turn;
  const int64_t n_rot = spec_.rope_of(i).n_rot;
  if (qkv[0].of->type == qkv[1].of->type && qkv[0].of->type == qkv[2].of->type) {
    for (const auto* more : {&k, &v, &gate}) q.insert(q.end(), more->begin(), more->end());
    wanted_.push_back({&l.wqkv, nullptr, std::move(q), a.head_dim, n_rot});
  } else {
    wanted_.push_back({&l.wq, nullptr, std::move(q), a.head_dim, n_rot});
    wanted_.push_back({&l.wk, nullptr, std::move(k), a.head_dim, n_rot});
    wanted_.push_back({&l.wv, nullptr, std::move(v)});
    wanted_.push_back({&l.wgate, nullptr, std::move(gate)});
  }
  declare_rest_of_attention(i, l);
}

void WeightLoader::declare_rest_of_attention(int64_t i, LayerWeights& l) {
  const std::string p = fmt::format("blk.{}.", i);
  const AttentionSpec& a = spec_.layer(i).attention;
  const int64_t d_q = a.width_q(), d_kv = a.width_kv(), n_rot = spec_.rope_of(i).n_rot;
  const bool turn = spec_.rope_neighbours;
  const auto bias = [&](const float** b, const TensorEntry* t, bool reorder) {
    if (t != nullptr) wanted_.push_back({nullptr, b, {{t, reorder}}, a.head_dim, n_rot});
  };
  if (a.qk_norm) {
    const bool whole = a.qk_norm_whole;
    bias(&l.q_norm, take(p + "attn_q_norm.weight", whole ? d_q : a.head_dim, 1), turn);
    bias(&l.k_norm, take(p + "attn_k_norm.weight", whole ? d_kv : a.head_dim, 1), turn);
  }
  if (a.sinks) vector(&l.sinks, p + "attn_sinks.weight", a.n_head);
  matrix(&l.wo, take(p + "attn_output.weight", d_q, spec_.n_embd));
  vector(&l.bo, p + "attn_output.bias", spec_.n_embd, true);
  if (spec_.layer(i).post_norms) vector(&l.attn_post_norm, p + "post_attention_norm.weight", spec_.n_embd);
}

/// Rows [first, first + n) of each of n_group groups of `group` rows, one after another.
std::vector<Rows> rows_of_groups(const TensorEntry* t, int64_t n_group, int64_t group, int64_t first,
                                 int64_t n) {
  std::vector<Rows> rows;
  for (int64_t g = 0; g < n_group; ++g) rows.emplace_back(t, g * group + first, n);
  return rows;
}

/// In the order of a projected row (kernels/delta_net.h); older files of grouped heads have all of a key
/// head's rows together.
void WeightLoader::declare_delta_net(int64_t i, LayerWeights& l) {
  const std::string p = fmt::format("blk.{}.", i);
  const DeltaNetSpec& d = spec_.layer(i).delta_net;
  const int64_t n_embd = spec_.n_embd, dim = d.head_dim, n_k = d.n_head_k, each = d.n_head_v / n_k;
  vector(&l.attn_norm, p + "attn_norm.weight", n_embd);
  std::vector<std::vector<Rows>> parts;
  const auto all_of = [&](const char* name, int64_t n) {
    if (const TensorEntry* t = take(p + name, n_embd, n)) parts.push_back({t});
  };
  if (d.grouped && m_.file_.find(p + "attn_qkv.weight") == nullptr) {
    const TensorEntry* t = take(p + "ssm_in.weight", n_embd, d.n_channel() + d.width_v());
    if (t == nullptr) return;
    const int64_t group = 2 * dim + 2 * each * dim;
    parts.push_back(rows_of_groups(t, n_k, group, 0, dim));
    parts.push_back(rows_of_groups(t, n_k, group, dim, dim));
    parts.push_back(rows_of_groups(t, n_k, group, 2 * dim, each * dim));
    parts.push_back(rows_of_groups(t, n_k, group, 2 * dim + each * dim, each * dim));
  } else {
    all_of("attn_qkv.weight", d.n_channel());
    all_of("attn_gate.weight", d.width_v());
  }
  if (d.grouped) {
    const TensorEntry* t = take(p + "ssm_ba.weight", n_embd, 2 * d.n_head_v);
    if (t == nullptr) return;
    parts.push_back(rows_of_groups(t, n_k, 2 * each, 0, each));
    parts.push_back(rows_of_groups(t, n_k, 2 * each, each, each));
  } else {
    all_of("ssm_beta.weight", d.n_head_v);
    all_of("ssm_alpha.weight", d.n_head_v);
  }
  if (!status_.ok()) return;
  // Neighbours of one type become one matrix.
  size_t n_matrix = 0;
  for (size_t at = 0; at < parts.size(); ++n_matrix) {
    Wanted w{&l.delta_in[n_matrix], nullptr, std::move(parts[at])};
    for (++at; at < parts.size() && parts[at].front().of->type == w.front().of->type; ++at)
      w.parts.insert(w.parts.end(), parts[at].begin(), parts[at].end());
    wanted_.push_back(std::move(w));
  }
  vector(&l.conv, take(p + "ssm_conv1d.weight", d.n_conv, d.n_channel()));
  wanted_.back().transposed = true;
  vector(&l.delta_rate, p + "ssm_a", d.n_head_v);
  wanted_.back().at_most_0 = true;
  vector(&l.delta_step_bias, p + "ssm_dt.bias", d.n_head_v);
  vector(&l.delta_norm, p + "ssm_norm.weight", dim);
  matrix(&l.wo, take(p + "ssm_out.weight", d.width_v(), n_embd));
}

const char* WeightLoader::ffn_norm_name(int64_t i) const {
  return spec_.layer(i).ffn_norm_is_post_attention ? "post_attention_norm.weight" : "ffn_norm.weight";
}

void WeightLoader::declare_ffn(int64_t i, LayerWeights& l) {
  const std::string p = fmt::format("blk.{}.", i);
  const int64_t n_ff = spec_.layer(i).ffn.n_ff;
  if (spec_.layer(i).pre_norms) vector(&l.ffn_norm, p + ffn_norm_name(i), spec_.n_embd);
  const bool both = spec_.layer(i).ffn.gate_in_up;
  const TensorEntry* gate = both ? nullptr : take(p + "ffn_gate.weight", spec_.n_embd, n_ff);
  const TensorEntry* up = take(p + "ffn_up.weight", spec_.n_embd, both ? 2 * n_ff : n_ff);
  if (both) gate = up;
  if (gate == nullptr || up == nullptr) return;
  const Rows gates(gate, 0, n_ff), ups(up, both ? n_ff : 0, n_ff);
  vector(&l.b_gate, p + "ffn_gate.bias", n_ff, true);
  vector(&l.b_up, p + "ffn_up.bias", n_ff, true);
  const bool biases =
      m_.file_.find(p + "ffn_gate.bias") != nullptr || m_.file_.find(p + "ffn_up.bias") != nullptr;
  if (!biases && joins(*gate, *up, n_ff)) {
    wanted_.push_back({&l.gate_up, nullptr, {gates, ups}});
  } else {
    wanted_.push_back({&l.gate, nullptr, {gates}});
    wanted_.push_back({&l.up, nullptr, {ups}});
  }
  matrix(&l.down, take(p + "ffn_down.weight", n_ff, spec_.n_embd));
  vector(&l.b_down, p + "ffn_down.bias", spec_.n_embd, true);
  if (spec_.layer(i).post_norms) vector(&l.ffn_post_norm, p + "post_ffw_norm.weight", spec_.n_embd);
}

/// Of a joined matrix in tiles, both halves must begin with one.
bool WeightLoader::joins(const TensorEntry& gate, const TensorEntry& up, int64_t n_ff) const {
  return gate.type == up.type && (!packing(gate) || n_ff % kernels::kPackRows == 0);
}

/// Of a layer or of an expert: one matrix or two.
template <class Weights>
void WeightLoader::gate_and_up(Weights& w, const Rows& gate, const Rows& up, int64_t n_ff) {
  if (joins(*gate.of, *up.of, n_ff)) {
    wanted_.push_back({&w.gate_up, nullptr, {gate, up}});
  } else {
    wanted_.push_back({&w.gate, nullptr, {gate}});
    wanted_.push_back({&w.up, nullptr, {up}});
  }
}

void WeightLoader::declare_experts(int64_t i, LayerWeights& l) {
  const std::string p = fmt::format("blk.{}.", i);
  const FfnSpec& ffn = spec_.layer(i).ffn;
  const int64_t n_ff = ffn.n_ff, n_embd = spec_.n_embd, n_expert = ffn.experts.n_expert;
  vector(&l.ffn_norm, p + ffn_norm_name(i), n_embd);
  matrix(&l.router, take(p + "ffn_gate_inp.weight", n_embd, n_expert));
  if (const int64_t n_shared = ffn.experts.n_shared_ff; n_shared > 0) {
    const TensorEntry* gate = take(p + "ffn_gate_shexp.weight", n_embd, n_shared);
    const TensorEntry* up = take(p + "ffn_up_shexp.weight", n_embd, n_shared);
    if (gate == nullptr || up == nullptr) return;
    gate_and_up(l, gate, up, n_shared);
    matrix(&l.down, take(p + "ffn_down_shexp.weight", n_shared, n_embd));
    if (ffn.experts.shared_gate) vector(&l.shared_gate, p + "ffn_gate_inp_shexp.weight", n_embd);
  }
  const bool both = m_.file_.find(p + "ffn_gate_up_exps.weight") != nullptr;  // gate first, for each expert
  const TensorEntry* joined =
      both ? take(p + "ffn_gate_up_exps.weight", n_embd, 2 * n_ff, false, n_expert) : nullptr;
  const TensorEntry* gate = both ? joined : take(p + "ffn_gate_exps.weight", n_embd, n_ff, false, n_expert);
  const TensorEntry* up = both ? joined : take(p + "ffn_up_exps.weight", n_embd, n_ff, false, n_expert);
  const TensorEntry* down = take(p + "ffn_down_exps.weight", n_ff, n_embd, false, n_expert);
  if (gate == nullptr || up == nullptr || down == nullptr) return;
  vector(&l.b_router, p + "ffn_gate_inp.bias", n_expert, true);
  vector(&l.b_gates, take(p + "ffn_gate_exps.bias", n_ff, n_expert, true));
  vector(&l.b_ups, take(p + "ffn_up_exps.bias", n_ff, n_expert, true));
  vector(&l.b_downs, take(p + "ffn_down_exps.bias", n_embd, n_expert, true));
  l.experts.resize(static_cast<size_t>(n_expert));
  for (int64_t e = 0; e < n_expert; ++e) {
    ExpertWeights& w = l.experts[static_cast<size_t>(e)];
    const int64_t first = e * n_ff * (both ? 2 : 1);
    const Rows gates(gate, first, n_ff), ups(up, both ? first + n_ff : first, n_ff);
    gate_and_up(w, gates, ups, n_ff);
    wanted_.push_back({&w.down, nullptr, {Rows(down, e * n_embd, n_embd)}});
  }
}

void WeightLoader::declare() {
  const TensorEntry* embedding = take("token_embd.weight", spec_.n_embd, spec_.n_vocab);
  if (embedding == nullptr) return;
  m_.embedding_ = *embedding;
  if (const TensorEntry* t = take("output_norm.weight", spec_.n_embd, 1)) {
    vector(&m_.output_norm_, t);
    wanted_.back().scale = spec_.logit_scale;  // where a bias follows, there is none
  }
  const TensorEntry* output = take("output.weight", spec_.n_embd, spec_.n_vocab, true);
  matrix(&m_.output_, output != nullptr ? output : embedding);
  vector(&m_.output_bias_, "output.bias", spec_.n_vocab, true);
  kernels::RopeParams& rope = m_.spec_.ropes.front();
  read_rope_factors("rope_freqs.weight", rope.n_rot, rope.freq_factors);
  if (rope.freq_factors.empty()) {
    read_rope_factors("rope_factors_short.weight", rope.n_rot, rope.freq_factors);
    read_rope_factors("rope_factors_long.weight", rope.n_rot, rope.long_factors);
    if (rope.freq_factors.empty() != rope.long_factors.empty())
      fail(bad("has one of the tensors rope_factors_short.weight and rope_factors_long.weight alone"));
  }
  m_.layers_.resize(static_cast<size_t>(spec_.n_layer()));
  for (int64_t i = 0; i < spec_.n_layer() && status_.ok(); ++i) {
    if (spec_.layer(i).delta_net) {
      declare_delta_net(i, m_.layers_[static_cast<size_t>(i)]);
    } else {
      declare_attention(i, m_.layers_[static_cast<size_t>(i)]);
    }
    if (spec_.layer(i).ffn.experts) {
      declare_experts(i, m_.layers_[static_cast<size_t>(i)]);
    } else {
      declare_ffn(i, m_.layers_[static_cast<size_t>(i)]);
    }
  }
}

/// Left as it is if there is no such tensor.
void WeightLoader::read_rope_factors(const std::string& name, int64_t n_rot, std::vector<float>& factors) {
  const TensorEntry* t = take(name, n_rot / 2, 1, true);
  if (t == nullptr) return;
  if (t->type != TensorType::f32) return fail(bad(fmt::format("tensor {} should be F32", name)));
  factors.resize(static_cast<size_t>(t->ne[0]));
  if (Status s = m_.file_.read(*t, 0, t->bytes, factors.data()); !s.ok()) return fail(std::move(s));
  if (!std::all_of(factors.begin(), factors.end(), [](float f) { return f > 0 && f < 1e9F; }))
    fail(bad(fmt::format("tensor {} has a factor that is not positive", name)));
}

/// Of a layer that predicts further tokens.
bool WeightLoader::is_unused(const std::string& name) const {
  for (int64_t i = spec_.n_layer(); i < spec_.n_layer() + spec_.n_layer_unused; ++i) {
    if (name.starts_with(fmt::format("blk.{}.", i))) return true;
  }
  return false;
}

Status WeightLoader::check_leftovers() const {
  for (const TensorEntry& t : m_.file_.tensors()) {
    if (!used_.contains(t.name) && !is_unused(t.name)) {
      return {StatusCode::unsupported,
              fmt::format("{}: tensor {} is not part of the {} architecture as this build knows it",
                          m_.file_.path(), quote(t.name), spec_.architecture)};
    }
  }
  return {};
}

}  // namespace narrows
