// Loads weights: every tensor is asked for by name with its expected shape, joined and reordered as weights.h
// says, and given to the buffer that suits it. A tensor that nobody asked for is an error too: the model
// would do something that this build does not compute.
#include "model/weights.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <set>

#include "base/memory.h"
#include "base/utf8.h"
#include "ggml-cpu.h"
#include "kernels/pack_weights.h"
#include "model/packing.h"

namespace narrows {

namespace {

/// Room for graph buffers, logits and the program itself beside the weights.
constexpr int64_t kMemoryMargin = int64_t{256} << 20;

/// One tensor to be made out of rows of one or more tensors of the file.
struct Plan {
  ggml_tensor** target;
  std::vector<const TensorEntry*> parts;  ///< rows one after another
  std::vector<bool> reorder;              ///< a part whose rows go from neighbour to halves order
  bool flat = false;                      ///< one dimension: norms and biases, always float32
  int64_t packed_at = -1;                 ///< offset among the tiles; -1: not packed
};

/// Row `r` in halves order comes from row rope_source(r) of the file (neighbour order).
int64_t rope_source(int64_t r, int64_t head_dim, int64_t n_rot) {
  const int64_t i = r % head_dim;
  const int64_t half = n_rot / 2;
  if (i >= n_rot) return r;
  return r - i + (i < half ? 2 * i : 2 * (i - half) + 1);
}

bool can_compute(ggml_type type) {
  if (type == GGML_TYPE_F32) return true;
  return type < GGML_TYPE_COUNT && ggml_get_type_traits(type)->to_float != nullptr &&
         ggml_get_type_traits_cpu(type)->vec_dot != nullptr;
}

void to_float(ggml_type type, const void* from, float* to, int64_t n) {
  if (type == GGML_TYPE_F32) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
  } else {
    ggml_get_type_traits(type)->to_float(from, to, n);
  }
}

}  // namespace

class WeightLoader {
 public:
  WeightLoader(ModelWeights& model, const LoadOptions& options, int64_t read_bytes)
      : m_(model), hp_(model.hparams_), options_(options), read_bytes_(read_bytes) {}

  Status run() {
    declare();
    if (!status_.ok()) return status_;
    if (Status s = check_leftovers(); !s.ok()) return s;
    if (Status s = check_memory(); !s.ok()) return s;
    if (Status s = allocate(); !s.ok()) return s;
    return fill();
  }

 private:
  Status bad(const std::string& what) const {
    return {StatusCode::invalid_file, fmt::format("{}: {}", m_.file_.path(), what)};
  }
  void fail(Status s) {
    if (status_.ok()) status_ = std::move(s);
  }

  /// The tensor of this name, checked; null if it is missing (an error unless optional).
  const TensorEntry* take(const std::string& name, int64_t n_in, int64_t n_out, bool optional = false) {
    const TensorEntry* t = m_.file_.find(name);
    if (t == nullptr) {
      if (!optional) fail(bad(fmt::format("tensor {} is missing, get the file again", name)));
      return nullptr;
    }
    used_.insert(t->name);
    if (t->ne[0] != n_in || t->ne[1] != n_out || t->ne[2] != 1 || t->ne[3] != 1) {
      fail(bad(fmt::format("tensor {} is {} but should be [{}, {}]", name, describe_shape(*t), n_in, n_out)));
      return nullptr;
    }
    if (!can_compute(t->type)) {
      fail({StatusCode::unsupported,
            fmt::format("{}: tensor {} is of type {}, which this build cannot compute with", m_.file_.path(),
                        name, ggml_type_name(t->type))});
      return nullptr;
    }
    return t;
  }

  void vector(ggml_tensor** target, const std::string& name, int64_t n, bool optional = false,
              bool reorder = false) {
    if (const TensorEntry* t = take(name, n, 1, optional)) plans_.push_back({target, {t}, {reorder}, true});
  }

  void matrix(ggml_tensor** target, const TensorEntry* t, bool reorder = false) {
    if (t != nullptr) plans_.push_back({target, {t}, {reorder}, false});
  }

  void declare_attention(int64_t i, LayerWeights& l) {
    const std::string p = fmt::format("blk.{}.", i);
    const int64_t d_q = hp_.n_head * hp_.head_dim, d_kv = hp_.n_head_kv * hp_.head_dim;
    const bool turn = hp_.rope_neighbours;
    vector(&l.attn_norm, p + "attn_norm.weight", hp_.n_embd);
    const TensorEntry* q = take(p + "attn_q.weight", hp_.n_embd, d_q);
    const TensorEntry* k = take(p + "attn_k.weight", hp_.n_embd, d_kv);
    const TensorEntry* v = take(p + "attn_v.weight", hp_.n_embd, d_kv);
    if (q == nullptr || k == nullptr || v == nullptr) return;
    const TensorEntry* bq = take(p + "attn_q.bias", d_q, 1, true);
    const TensorEntry* bk = take(p + "attn_k.bias", d_kv, 1, true);
    const TensorEntry* bv = take(p + "attn_v.bias", d_kv, 1, true);
    const bool all_biases = bq != nullptr && bk != nullptr && bv != nullptr;
    const bool no_bias = bq == nullptr && bk == nullptr && bv == nullptr;
    if (q->type == k->type && q->type == v->type && (all_biases || no_bias)) {
      plans_.push_back({&l.wqkv, {q, k, v}, {turn, turn, false}, false});
      if (all_biases) plans_.push_back({&l.bqkv, {bq, bk, bv}, {turn, turn, false}, true});
    } else {
      matrix(&l.wq, q, turn);
      matrix(&l.wk, k, turn);
      matrix(&l.wv, v);
      if (bq != nullptr) plans_.push_back({&l.bq, {bq}, {turn}, true});
      if (bk != nullptr) plans_.push_back({&l.bk, {bk}, {turn}, true});
      if (bv != nullptr) plans_.push_back({&l.bv, {bv}, {false}, true});
    }
    if (hp_.qk_norm) {
      vector(&l.q_norm, p + "attn_q_norm.weight", hp_.head_dim);
      vector(&l.k_norm, p + "attn_k_norm.weight", hp_.head_dim);
    }
    matrix(&l.wo, take(p + "attn_output.weight", d_q, hp_.n_embd));
    vector(&l.bo, p + "attn_output.bias", hp_.n_embd, true);
  }

  void declare_ffn(int64_t i, LayerWeights& l) {
    const std::string p = fmt::format("blk.{}.", i);
    vector(&l.ffn_norm, p + "ffn_norm.weight", hp_.n_embd);
    const TensorEntry* gate = take(p + "ffn_gate.weight", hp_.n_embd, hp_.n_ff);
    const TensorEntry* up = take(p + "ffn_up.weight", hp_.n_embd, hp_.n_ff);
    if (gate == nullptr || up == nullptr) return;
    vector(&l.b_gate, p + "ffn_gate.bias", hp_.n_ff, true);
    vector(&l.b_up, p + "ffn_up.bias", hp_.n_ff, true);
    const bool biases =
        m_.file_.find(p + "ffn_gate.bias") != nullptr || m_.file_.find(p + "ffn_up.bias") != nullptr;
    // Of a joined matrix in tiles, both halves must begin with one.
    if (gate->type == up->type && !biases && (!packing(*gate) || hp_.n_ff % kernels::kPackRows == 0)) {
      plans_.push_back({&l.gate_up, {gate, up}, {false, false}, false});
    } else {
      matrix(&l.gate, gate);
      matrix(&l.up, up);
    }
    matrix(&l.down, take(p + "ffn_down.weight", hp_.n_ff, hp_.n_embd));
    vector(&l.b_down, p + "ffn_down.bias", hp_.n_embd, true);
  }

  void declare() {
    const TensorEntry* embedding = take("token_embd.weight", hp_.n_embd, hp_.n_vocab);
    if (embedding == nullptr) return;
    m_.embedding_ = *embedding;
    vector(&m_.output_norm_, "output_norm.weight", hp_.n_embd);
    const TensorEntry* output = take("output.weight", hp_.n_embd, hp_.n_vocab, true);
    matrix(&m_.output_, output != nullptr ? output : embedding);
    vector(&m_.output_bias_, "output.bias", hp_.n_vocab, true);
    if (const TensorEntry* t = take("rope_freqs.weight", hp_.rope.n_rot / 2, 1, true)) read_rope_factors(*t);
    m_.layers_.resize(static_cast<size_t>(hp_.n_layer));
    for (int64_t i = 0; i < hp_.n_layer && status_.ok(); ++i) {
      declare_attention(i, m_.layers_[static_cast<size_t>(i)]);
      declare_ffn(i, m_.layers_[static_cast<size_t>(i)]);
    }
  }

  void read_rope_factors(const TensorEntry& t) {
    if (t.type != GGML_TYPE_F32) return fail(bad("tensor rope_freqs.weight should be F32"));
    std::vector<float>& factors = m_.hparams_.rope.freq_factors;
    factors.resize(static_cast<size_t>(t.ne[0]));
    if (Status s = m_.file_.read(t.offset, t.bytes, factors.data()); !s.ok()) return fail(std::move(s));
    if (!std::all_of(factors.begin(), factors.end(), [](float f) { return f > 0 && f < 1e9F; })) {
      fail(bad("tensor rope_freqs.weight has a factor that is not positive"));
    }
  }

  Status check_leftovers() const {
    for (const TensorEntry& t : m_.file_.tensors()) {
      if (!used_.contains(t.name)) {
        return {StatusCode::unsupported,
                fmt::format("{}: tensor {} is not part of the {} architecture as this build knows it",
                            m_.file_.path(), quote(t.name), hp_.architecture)};
      }
    }
    return {};
  }

  /// Norms and biases are always float32, matrices only when that is asked for.
  bool to_f32(const Plan& p) const { return p.flat || options_.float_weights; }

  std::optional<kernels::Packing> packing(const TensorEntry& t) const {
    if (!options_.repack || options_.float_weights) return std::nullopt;
    return packing_of(t.type, t.ne[0]);
  }
  std::optional<kernels::Packing> packing(const Plan& p) const {
    return p.flat ? std::nullopt : packing(*p.parts.front());
  }

  static int64_t n_out(const Plan& p) {
    int64_t n = 0;
    for (const TensorEntry* t : p.parts) n += p.flat ? t->ne[0] : t->ne[1];
    return n;
  }

  int64_t plan_bytes(const Plan& p) const {
    if (const auto kind = packing(p)) {
      return kernels::pack_tiles(n_out(p)) * kernels::tile_bytes(*kind, p.parts.front()->ne[0]);
    }
    int64_t bytes = 0;
    for (const TensorEntry* t : p.parts) bytes += to_f32(p) ? t->ne[0] * t->n_row() * 4 : t->bytes;
    return bytes;
  }

  int64_t bytes_needed() const {
    int64_t need = kMemoryMargin;
    for (const Plan& p : plans_) need += plan_bytes(p);
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

  Status check_memory() const {
    const int64_t have = available_memory_bytes();
    if (have <= 0 || bytes_needed() <= have) return {};
    return too_large(fmt::format("{:.1f} GB are free", static_cast<double>(have) / 1e9));
  }

  Status allocate() {
    // Two tables: of tensors with data, and of those that only give a packed matrix its name and shape.
    for (int i = 0; i < 2; ++i) {
      const ggml_init_params params = {ggml_tensor_overhead() * (plans_.size() + 1), nullptr, true};
      m_.contexts_.push_back(ggml_init(params));
      if (m_.contexts_.back() == nullptr)
        return {StatusCode::out_of_memory, "no memory for the tensor table"};
    }
    int64_t tiles = 0;
    for (Plan& p : plans_) {
      const TensorEntry& first = *p.parts.front();
      const bool packs = packing(p).has_value();
      if (packs) {
        p.packed_at = tiles;
        tiles += (plan_bytes(p) + 63) / 64 * 64;
      }
      ggml_context* ctx = m_.contexts_[packs ? 1 : 0];
      const ggml_type type = to_f32(p) ? GGML_TYPE_F32 : first.type;
      *p.target = p.flat ? ggml_new_tensor_1d(ctx, type, n_out(p))
                         : ggml_new_tensor_2d(ctx, type, first.ne[0], n_out(p));
      ggml_set_name(*p.target, first.name.c_str());
      if (p.flat) continue;
      std::vector<ModelWeights::RowSource>& sources = m_.sources_[*p.target];
      for (size_t i = 0; i < p.parts.size(); ++i) sources.push_back({p.parts[i], p.reorder[i]});
    }
    m_.tiles_ = PageArray(tiles);
    if (!m_.tiles_.ok()) return too_large("the system does not give it");
    if (ggml_get_first_tensor(m_.contexts_[0]) == nullptr) return {};
    ggml_backend_buffer_t buffer =
        ggml_backend_alloc_ctx_tensors_from_buft(m_.contexts_[0], ggml_backend_cpu_buffer_type());
    if (buffer == nullptr) return too_large("the system does not give it");
    ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    m_.buffers_.push_back(buffer);
    return {};
  }

  Status fill() {
    std::vector<char> raw, whole;
    for (const Plan& p : plans_) {
      const bool in_order = std::none_of(p.reorder.begin(), p.reorder.end(), [](bool r) { return r; });
      if (p.packed_at >= 0 && in_order) {
        if (Status s = pack_from_file(p); !s.ok()) return s;
        continue;
      }
      int64_t bytes = 0;
      for (const TensorEntry* t : p.parts) bytes += to_f32(p) ? t->ne[0] * t->n_row() * 4 : t->bytes;
      whole.resize(static_cast<size_t>(bytes));
      char* to = whole.data();
      for (size_t i = 0; i < p.parts.size(); ++i) {
        const TensorEntry& t = *p.parts[i];
        raw.resize(static_cast<size_t>(t.bytes));
        if (Status s = m_.file_.read(t.offset, t.bytes, raw.data()); !s.ok()) return s;
        to += put(p, t, p.reorder[i], raw.data(), to);
      }
      if (p.packed_at < 0) {
        ggml_backend_tensor_set(*p.target, whole.data(), 0, whole.size());
      } else {
        pack(p, 0, n_out(p), whole.data());
      }
    }
    return {};
  }

  /// Rows in the file's order, some at a time.
  Status pack_from_file(const Plan& p) {
    const int64_t row = p.parts.front()->row_bytes(), n = n_out(p);
    const int64_t at_once =
        std::max<int64_t>(1, read_bytes_ / (row * kernels::kPackRows)) * kernels::kPackRows;
    std::vector<char> rows(static_cast<size_t>(std::min(at_once, n) * row));
    for (int64_t first = 0; first < n; first += at_once) {
      const int64_t end = std::min(first + at_once, n);
      int64_t part = 0;  // the part's first row
      for (const TensorEntry* t : p.parts) {
        const int64_t from = std::max(first, part), to = std::min(end, part + t->ne[1]);
        if (from < to) {
          Status s = m_.file_.read(t->offset + (from - part) * row, (to - from) * row,
                                   rows.data() + (from - first) * row);
          if (!s.ok()) return s;
        }
        part += t->ne[1];
      }
      pack(p, first, end, rows.data());
    }
    return {};
  }

  /// Rows [begin, end) of a plan's matrix in the file's blocks into its tiles; begin is a tile's first.
  void pack(const Plan& p, int64_t begin, int64_t end, const char* rows) {
    const kernels::Packing kind = *packing(p);
    const int64_t n_in = p.parts.front()->ne[0];
    const int64_t row = kernels::file_row_bytes(kind, n_in), tile = kernels::tile_bytes(kind, n_in);
    uint8_t* const to = m_.tiles_.data() + p.packed_at;
    for (int64_t first = begin; first < end; first += kernels::kPackRows) {
      const uint8_t* of_tile[kernels::kPackRows] = {};
      for (int64_t r = 0; r < std::min(kernels::kPackRows, end - first); ++r)
        of_tile[r] = reinterpret_cast<const uint8_t*>(rows) + (first - begin + r) * row;
      kernels::pack_tile(kind, n_in, of_tile, to + first / kernels::kPackRows * tile);
    }
    m_.packed_[*p.target] = {kind, n_in, n_out(p), to};
  }

  /// Copies one part, converted and reordered; returns the bytes written. What moves is a row of a matrix, or
  /// one number of a vector.
  int64_t put(const Plan& p, const TensorEntry& t, bool reorder, const char* raw, char* to) const {
    std::vector<float> numbers;
    int64_t bytes = t.bytes;
    if (to_f32(p)) {
      numbers.resize(static_cast<size_t>(t.ne[0] * t.n_row()));
      to_float(t.type, raw, numbers.data(), static_cast<int64_t>(numbers.size()));
      raw = reinterpret_cast<const char*>(numbers.data());
      bytes = static_cast<int64_t>(numbers.size() * sizeof(float));
    }
    if (!reorder) {
      std::memcpy(to, raw, static_cast<size_t>(bytes));
      return bytes;
    }
    const int64_t n_item = p.flat ? t.ne[0] : t.ne[1], item = bytes / n_item;
    for (int64_t r = 0; r < n_item; ++r) {
      std::memcpy(to + r * item, raw + rope_source(r, hp_.head_dim, hp_.rope.n_rot) * item,
                  static_cast<size_t>(item));
    }
    return bytes;
  }

  ModelWeights& m_;
  const Hparams& hp_;
  const LoadOptions& options_;
  int64_t read_bytes_;
  std::vector<Plan> plans_;
  std::set<std::string> used_;
  Status status_;
};

ModelWeights::ModelWeights(GgufFile file, const Hparams& hparams)
    : file_(std::move(file)), hparams_(hparams) {}

ModelWeights::~ModelWeights() {
  for (ggml_backend_buffer_t b : buffers_) ggml_backend_buffer_free(b);
  for (ggml_context* c : contexts_) ggml_free(c);
}

Result<std::unique_ptr<ModelWeights>> ModelWeights::load(GgufFile file, const Hparams& hparams,
                                                         const LoadOptions& options, int64_t read_bytes) {
  std::unique_ptr<ModelWeights> m(new ModelWeights(std::move(file), hparams));
  if (Status s = WeightLoader(*m, options, read_bytes).run(); !s.ok()) return s;
  return m;
}

Status ModelWeights::embed(std::span<const Token> tokens, float* out) const {
  const int64_t row_bytes = embedding_.row_bytes();
  std::vector<char> row(static_cast<size_t>(row_bytes));
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= hparams_.n_vocab) {
      return {StatusCode::invalid_argument,
              fmt::format("token {} is outside the vocabulary of {}", tokens[i], hparams_.n_vocab)};
    }
    if (Status s = file_.read(embedding_.offset + tokens[i] * row_bytes, row_bytes, row.data()); !s.ok())
      return s;
    to_float(embedding_.type, row.data(), out + static_cast<int64_t>(i) * hparams_.n_embd, hparams_.n_embd);
  }
  return file_.unchanged();
}

Status ModelWeights::read_rows(const ggml_tensor* matrix, int64_t first, int64_t n, float* out) const {
  const auto found = sources_.find(matrix);
  if (found == sources_.end() || first < 0 || n < 0 || first + n > matrix->ne[1])
    return {StatusCode::internal, "no such rows of a weight"};
  const int64_t n_in = matrix->ne[0];
  std::vector<char> raw;
  for (const RowSource& part : found->second) {
    const TensorEntry& t = *part.entry;
    const int64_t rows = std::min(n, t.ne[1] - first), row_bytes = t.row_bytes();
    if (rows <= 0) {
      first -= t.ne[1];
      continue;
    }
    // Rows that change places do so within a head: one at a time.
    const int64_t at_once = part.reorder ? 1 : rows;
    raw.resize(static_cast<size_t>(at_once * row_bytes));
    for (int64_t r = first; r < first + rows; r += at_once, out += at_once * n_in) {
      const int64_t from = part.reorder ? rope_source(r, hparams_.head_dim, hparams_.rope.n_rot) : r;
      if (Status s = file_.read(t.offset + from * row_bytes, at_once * row_bytes, raw.data()); !s.ok())
        return s;
      to_float(t.type, raw.data(), out, at_once * n_in);
    }
    n -= rows;
    first = 0;
    if (n == 0) break;
  }
  return file_.unchanged();
}

const kernels::PackedMatrix* ModelWeights::packed(const ggml_tensor* matrix) const {
  const auto found = packed_.find(matrix);
  return found == packed_.end() ? nullptr : &found->second;
}

int64_t ModelWeights::allocated_bytes() const {
  int64_t n = tiles_.size();
  for (ggml_backend_buffer_t b : buffers_) n += static_cast<int64_t>(ggml_backend_buffer_get_size(b));
  return n;
}

}  // namespace narrows
