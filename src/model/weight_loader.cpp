// Loads weights: every tensor is asked for by name with its expected shape, joined and reordered as weights.h
// says, and given to the buffer that suits it. A tensor that nobody asked for is an error too: the model
// would do something that this build does not compute.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <set>

#include "base/memory_ledger.h"
#include "base/utf8.h"
#include "kernels/pack_weights.h"
#include "model/weights.h"

namespace narrows {

namespace {

/// Room for graph buffers, logits and the program itself beside the weights.
constexpr int64_t kMemoryMargin = int64_t{256} << 20;

/// Rows [first, first + n) of a tensor of the file; of three dimensions, those of one matrix after another.
struct Rows {
  const TensorEntry* of = nullptr;
  bool reorder = false;  ///< from neighbour to halves order
  int64_t first = 0;
  int64_t n = 0;

  Rows(const TensorEntry* t, bool reordered = false) : of(t), reorder(reordered), n(t->n_row()) {}
  Rows(const TensorEntry* t, int64_t first_row, int64_t n_row) : of(t), first(first_row), n(n_row) {}
  int64_t n_in() const { return of->ne[0]; }
  int64_t bytes() const { return n * of->row_bytes(); }
  int64_t begin() const { return first * of->row_bytes(); }  ///< byte of the tensor
};

/// A matrix or vector to be made out of rows of one or more tensors of the file.
struct Wanted {
  Matrix* matrix = nullptr;        ///< one of the two
  const float** vector = nullptr;  ///< norms and biases, always float32
  std::vector<Rows> parts;         ///< one after another
  int64_t head_dim = 0;            ///< of rows that are reordered
  int64_t n_rot = 0;
  int64_t at = 0;   ///< bytes before it in its array
  float scale = 1;  ///< on a vector's numbers

  const Rows& front() const { return parts.front(); }
};

/// Row `r` in halves order comes from row rope_source(r) of the file (neighbour order).
int64_t rope_source(int64_t r, int64_t head_dim, int64_t n_rot) {
  const int64_t i = r % head_dim;
  const int64_t half = n_rot / 2;
  if (i >= n_rot) return r;
  return r - i + (i < half ? 2 * i : 2 * (i - half) + 1);
}

}  // namespace

class WeightLoader {
 public:
  WeightLoader(ModelWeights& model, const LoadOptions& options, int64_t read_bytes)
      : m_(model), spec_(model.spec_), options_(options), read_bytes_(read_bytes) {}

  Status run() {
    declare();
    if (!status_.ok()) return status_;
    if (Status s = check_leftovers(); !s.ok()) return s;
    if (Status s = claim_memory(); !s.ok()) return s;
    if (Status s = allocate(); !s.ok()) return s;
    if (Status s = fill(); !s.ok()) return s;
    m_.claim_.resize(m_.allocated_bytes());
    return {};
  }

 private:
  Status bad(const std::string& what) const {
    return {StatusCode::invalid_file, fmt::format("{}: {}", m_.file_.path(), what)};
  }
  void fail(Status s) {
    if (status_.ok()) status_ = std::move(s);
  }

  /// The tensor of this name, checked; null if it is missing (an error unless optional). n_matrix: one for
  /// each expert.
  const TensorEntry* take(const std::string& name, int64_t n_in, int64_t n_out, bool optional = false,
                          int64_t n_matrix = 1) {
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

  void vector(const float** target, const TensorEntry* t) {
    if (t != nullptr) wanted_.push_back({nullptr, target, {t}});
  }
  void vector(const float** target, const std::string& name, int64_t n, bool optional = false) {
    vector(target, take(name, n, 1, optional));
  }
  void matrix(Matrix* target, const TensorEntry* t) {
    if (t != nullptr) wanted_.push_back({target, nullptr, {t}});
  }

  void declare_attention(int64_t i, LayerWeights& l) {
    const std::string p = fmt::format("blk.{}.", i);
    const AttentionSpec& a = spec_.layer(i).attention;
    const int64_t d_q = a.width_q(), d_kv = a.width_kv(), n_rot = spec_.rope_of(i).n_rot;
    const bool turn = spec_.rope_neighbours;
    if (spec_.layer(i).pre_norms) vector(&l.attn_norm, p + "attn_norm.weight", spec_.n_embd);
    std::vector<Rows> qkv;
    if (m_.file_.find(p + "attn_qkv.weight") != nullptr && m_.file_.find(p + "attn_q.weight") == nullptr) {
      const TensorEntry* all = take(p + "attn_qkv.weight", spec_.n_embd, d_q + 2 * d_kv);
      if (all == nullptr) return;
      qkv = {Rows(all, 0, d_q), Rows(all, d_q, d_kv), Rows(all, d_q + d_kv, d_kv)};
    } else {
      for (const auto& [name, n] :
           {std::pair("attn_q.weight", d_q), {"attn_k.weight", d_kv}, {"attn_v.weight", d_kv}}) {
        if (const TensorEntry* t = take(p + name, spec_.n_embd, n)) qkv.emplace_back(t);
      }
      if (qkv.size() < 3) return;
    }
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

  const char* ffn_norm_name(int64_t i) const {
    return spec_.layer(i).ffn_norm_is_post_attention ? "post_attention_norm.weight" : "ffn_norm.weight";
  }

  void declare_ffn(int64_t i, LayerWeights& l) {
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
  bool joins(const TensorEntry& gate, const TensorEntry& up, int64_t n_ff) const {
    return gate.type == up.type && (!packing(gate) || n_ff % kernels::kPackRows == 0);
  }

  /// Of a layer or of an expert: one matrix or two.
  template <class Weights>
  void gate_and_up(Weights& w, const Rows& gate, const Rows& up, int64_t n_ff) {
    if (joins(*gate.of, *up.of, n_ff)) {
      wanted_.push_back({&w.gate_up, nullptr, {gate, up}});
    } else {
      wanted_.push_back({&w.gate, nullptr, {gate}});
      wanted_.push_back({&w.up, nullptr, {up}});
    }
  }

  void declare_experts(int64_t i, LayerWeights& l) {
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
    const TensorEntry* gate = take(p + "ffn_gate_exps.weight", n_embd, n_ff, false, n_expert);
    const TensorEntry* up = take(p + "ffn_up_exps.weight", n_embd, n_ff, false, n_expert);
    const TensorEntry* down = take(p + "ffn_down_exps.weight", n_ff, n_embd, false, n_expert);
    if (gate == nullptr || up == nullptr || down == nullptr) return;
    vector(&l.b_router, p + "ffn_gate_inp.bias", n_expert, true);
    vector(&l.b_gates, take(p + "ffn_gate_exps.bias", n_ff, n_expert, true));
    vector(&l.b_ups, take(p + "ffn_up_exps.bias", n_ff, n_expert, true));
    vector(&l.b_downs, take(p + "ffn_down_exps.bias", n_embd, n_expert, true));
    l.experts.resize(static_cast<size_t>(n_expert));
    for (int64_t e = 0; e < n_expert; ++e) {
      ExpertWeights& w = l.experts[static_cast<size_t>(e)];
      const Rows gates(gate, e * n_ff, n_ff), ups(up, e * n_ff, n_ff);
      gate_and_up(w, gates, ups, n_ff);
      wanted_.push_back({&w.down, nullptr, {Rows(down, e * n_embd, n_embd)}});
    }
  }

  void declare() {
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
      declare_attention(i, m_.layers_[static_cast<size_t>(i)]);
      if (spec_.layer(i).ffn.experts) {
        declare_experts(i, m_.layers_[static_cast<size_t>(i)]);
      } else {
        declare_ffn(i, m_.layers_[static_cast<size_t>(i)]);
      }
    }
  }

  /// Left as it is if there is no such tensor.
  void read_rope_factors(const std::string& name, int64_t n_rot, std::vector<float>& factors) {
    const TensorEntry* t = take(name, n_rot / 2, 1, true);
    if (t == nullptr) return;
    if (t->type != TensorType::f32) return fail(bad(fmt::format("tensor {} should be F32", name)));
    factors.resize(static_cast<size_t>(t->ne[0]));
    if (Status s = m_.file_.read(*t, 0, t->bytes, factors.data()); !s.ok()) return fail(std::move(s));
    if (!std::all_of(factors.begin(), factors.end(), [](float f) { return f > 0 && f < 1e9F; }))
      fail(bad(fmt::format("tensor {} has a factor that is not positive", name)));
  }

  Status check_leftovers() const {
    for (const TensorEntry& t : m_.file_.tensors()) {
      if (!used_.contains(t.name)) {
        return {StatusCode::unsupported,
                fmt::format("{}: tensor {} is not part of the {} architecture as this build knows it",
                            m_.file_.path(), quote(t.name), spec_.architecture)};
      }
    }
    return {};
  }

  /// Norms and biases are always float32, matrices only when that is asked for.
  bool to_f32(const Wanted& p) const { return p.vector != nullptr || options_.float_weights; }

  std::optional<kernels::Packing> packing(const TensorEntry& t) const {
    if (!options_.repack || options_.float_weights) return std::nullopt;
    return packing_of(t.type, t.ne[0]);
  }
  std::optional<kernels::Packing> packing(const Wanted& p) const {
    return p.vector != nullptr ? std::nullopt : packing(*p.front().of);
  }

  static int64_t n_out(const Wanted& p) {
    int64_t n = 0;
    for (const Rows& r : p.parts) n += p.vector != nullptr ? r.n_in() * r.n : r.n;
    return n;
  }

  int64_t bytes_of(const Wanted& p) const {
    if (const auto kind = packing(p)) {
      return kernels::pack_tiles(n_out(p)) * kernels::tile_bytes(*kind, p.front().n_in());
    }
    int64_t bytes = 0;
    for (const Rows& r : p.parts) bytes += to_f32(p) ? r.n_in() * r.n * 4 : r.bytes();
    return bytes;
  }

  int64_t bytes_needed() const {
    int64_t need = kMemoryMargin;
    for (const Wanted& p : wanted_) need += bytes_of(p);
    return need;
  }

  Status too_large(const std::string& why) const {
    return {
        StatusCode::out_of_memory,
        fmt::format(
            "{}: the weights need {:.1f} GB of memory and {}, use a smaller model or a stronger quantisation "
            "of it",
            m_.file_.path(), static_cast<double>(bytes_needed()) / 1e9, why)};
  }

  Status claim_memory() {
    const int64_t have = MemoryLedger::process().free_bytes();
    if (m_.claim_.resize(bytes_needed())) return {};
    return too_large(fmt::format("{:.1f} GB are free", static_cast<double>(have) / 1e9));
  }

  Status allocate() {
    int64_t matrices = 0, vectors = 0;
    for (Wanted& p : wanted_) {
      int64_t& before = p.vector != nullptr ? vectors : matrices;
      p.at = before;
      before += (bytes_of(p) + 63) / 64 * 64;
    }
    m_.matrices_ = PageArray(matrices);
    m_.vectors_ = AlignedArray<float>(vectors / static_cast<int64_t>(sizeof(float)));
    if (!m_.matrices_.ok() || !m_.vectors_.ok()) return too_large("the system does not give it");
    for (const Wanted& p : wanted_) {
      if (p.vector != nullptr) {
        *p.vector = m_.vectors_.data() + p.at / static_cast<int64_t>(sizeof(float));
        continue;
      }
      const TensorEntry& first = *p.front().of;
      const uint8_t* at = m_.matrices_.data() + p.at;
      const std::string which = first.ne[2] > 1 ? fmt::format(" {}", p.front().first / p.front().n) : "";
      *p.matrix = {
          first.name + which, to_f32(p) ? TensorType::f32 : first.type, first.ne[0], n_out(p), {}, nullptr};
      if (const auto kind = packing(p)) {
        p.matrix->tiles = {*kind, first.ne[0], n_out(p), at};
      } else {
        p.matrix->rows = reinterpret_cast<const char*>(at);
      }
    }
    return {};
  }

  char* memory_of(const Wanted& p) {
    return p.vector != nullptr ? reinterpret_cast<char*>(m_.vectors_.data()) + p.at
                               : reinterpret_cast<char*>(m_.matrices_.data()) + p.at;
  }

  Status fill() {
    std::vector<char> raw, whole;
    for (const Wanted& p : wanted_) {
      const bool in_order =
          std::none_of(p.parts.begin(), p.parts.end(), [](const Rows& r) { return r.reorder; });
      const bool packs = packing(p).has_value();
      if (packs && in_order) {
        if (Status s = pack_from_file(p); !s.ok()) return s;
        continue;
      }
      char* to = memory_of(p);
      if (packs) {
        int64_t bytes = 0;
        for (const Rows& r : p.parts) bytes += r.bytes();
        whole.resize(static_cast<size_t>(bytes));
        to = whole.data();
      }
      for (const Rows& r : p.parts) {
        raw.resize(static_cast<size_t>(r.bytes()));
        if (Status s = m_.file_.read(*r.of, r.begin(), r.bytes(), raw.data()); !s.ok()) return s;
        to += put(p, r, raw.data(), to);
      }
      if (packs) pack(p, 0, n_out(p), whole.data());
    }
    return {};
  }

  /// Rows in the file's order, some at a time.
  Status pack_from_file(const Wanted& p) {
    const int64_t row = p.front().of->row_bytes(), n = n_out(p);
    const int64_t at_once =
        std::max<int64_t>(1, read_bytes_ / (row * kernels::kPackRows)) * kernels::kPackRows;
    std::vector<char> rows(static_cast<size_t>(std::min(at_once, n) * row));
    for (int64_t first = 0; first < n; first += at_once) {
      const int64_t end = std::min(first + at_once, n);
      int64_t part = 0;  // the part's first row
      for (const Rows& r : p.parts) {
        const int64_t from = std::max(first, part), to = std::min(end, part + r.n);
        if (from < to) {
          Status s = m_.file_.read(*r.of, r.begin() + (from - part) * row, (to - from) * row,
                                   rows.data() + (from - first) * row);
          if (!s.ok()) return s;
        }
        part += r.n;
      }
      pack(p, first, end, rows.data());
    }
    return {};
  }

  /// Rows [begin, end) of a wanted matrix in the file's blocks into its tiles; begin is a tile's first.
  void pack(const Wanted& p, int64_t begin, int64_t end, const char* rows) {
    const kernels::Packing kind = *packing(p);
    const int64_t n_in = p.front().n_in();
    const int64_t row = kernels::file_row_bytes(kind, n_in), tile = kernels::tile_bytes(kind, n_in);
    uint8_t* const to = m_.matrices_.data() + p.at;
    for (int64_t first = begin; first < end; first += kernels::kPackRows) {
      const uint8_t* of_tile[kernels::kPackRows] = {};
      for (int64_t r = 0; r < std::min(kernels::kPackRows, end - first); ++r)
        of_tile[r] = reinterpret_cast<const uint8_t*>(rows) + (first - begin + r) * row;
      kernels::pack_tile(kind, n_in, of_tile, to + first / kernels::kPackRows * tile);
    }
  }

  /// Copies one part, converted and reordered; returns the bytes written. What moves is a row of a matrix, or
  /// one number of a vector.
  int64_t put(const Wanted& p, const Rows& part, const char* raw, char* to) const {
    std::vector<float> numbers;
    int64_t bytes = part.bytes();
    if (to_f32(p)) {
      numbers.resize(static_cast<size_t>(part.n_in() * part.n));
      to_float(part.of->type, raw, numbers.data(), static_cast<int64_t>(numbers.size()));
      for (float& x : numbers) x *= p.scale;
      raw = reinterpret_cast<const char*>(numbers.data());
      bytes = static_cast<int64_t>(numbers.size() * sizeof(float));
    }
    if (!part.reorder) {
      std::memcpy(to, raw, static_cast<size_t>(bytes));
      return bytes;
    }
    const int64_t n_item = p.vector != nullptr ? part.n_in() : part.n, item = bytes / n_item;
    for (int64_t r = 0; r < n_item; ++r) {
      std::memcpy(to + r * item, raw + rope_source(r, p.head_dim, p.n_rot) * item, static_cast<size_t>(item));
    }
    return bytes;
  }

  ModelWeights& m_;
  const ModelSpec& spec_;
  const LoadOptions& options_;
  int64_t read_bytes_;
  std::vector<Wanted> wanted_;
  std::set<std::string> used_;
  Status status_;
};

Result<std::unique_ptr<ModelWeights>> ModelWeights::load(GgufFile file, const ModelSpec& spec,
                                                         const LoadOptions& options, int64_t read_bytes) {
  std::unique_ptr<ModelWeights> m(new ModelWeights(std::move(file), spec));
  if (Status s = WeightLoader(*m, options, read_bytes).run(); !s.ok()) return s;
  return m;
}

}  // namespace narrows
