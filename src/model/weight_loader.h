// How weights come out of a file, seen by the two files of the loader alone: every tensor is asked for by
// name with its expected shape (weight_names.cpp), joined and reordered as weights.h says, and given to the
// buffer that suits it (weight_loader.cpp). A tensor that nobody asked for is an error too: the model would
// do something that this build does not compute.
#pragma once

#include <optional>
#include <set>
#include <string>
#include <vector>

#include "model/weights.h"

namespace narrows {

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
  int64_t at = 0;           ///< bytes before it in its array
  float scale = 1;          ///< on a vector's numbers
  bool transposed = false;  ///< a vector of rows becomes one of columns
  bool at_most_0 = false;   ///< a vector with another number is refused

  const Rows& front() const { return parts.front(); }
};

class WeightLoader {
 public:
  WeightLoader(ModelWeights& model, const LoadOptions& options, int64_t read_bytes)
      : m_(model), spec_(model.spec_), options_(options), read_bytes_(read_bytes) {}

  Status run();

 private:
  Status bad(const std::string& what) const;
  void fail(Status s) {
    if (status_.ok()) status_ = std::move(s);
  }

  // What is wanted; weight_names.cpp.
  /// The tensor of this name, checked; null if it is missing (an error unless optional). n_matrix: one for
  /// each expert.
  const TensorEntry* take(const std::string& name, int64_t n_in, int64_t n_out, bool optional = false,
                          int64_t n_matrix = 1);
  void vector(const float** target, const TensorEntry* t) {
    if (t != nullptr) wanted_.push_back({nullptr, target, {t}});
  }
  void vector(const float** target, const std::string& name, int64_t n, bool optional = false) {
    vector(target, take(name, n, 1, optional));
  }
  void matrix(Matrix* target, const TensorEntry* t) {
    if (t != nullptr) wanted_.push_back({target, nullptr, {t}});
  }
  void declare();
  void declare_attention(int64_t i, LayerWeights& l);
  void declare_gated_qkv(int64_t i, LayerWeights& l, const std::vector<Rows>& qkv);
  void declare_rest_of_attention(int64_t i, LayerWeights& l);
  void declare_delta_net(int64_t i, LayerWeights& l);
  void declare_ffn(int64_t i, LayerWeights& l);
  void declare_experts(int64_t i, LayerWeights& l);
  const char* ffn_norm_name(int64_t i) const;
  bool joins(const TensorEntry& gate, const TensorEntry& up, int64_t n_ff) const;
  template <class Weights>
  void gate_and_up(Weights& w, const Rows& gate, const Rows& up, int64_t n_ff);
  void read_rope_factors(const std::string& name, int64_t n_rot, std::vector<float>& factors);
  bool is_unused(const std::string& name) const;
  Status check_leftovers() const;

  // Where it goes.
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

  int64_t bytes_of(const Wanted& p) const;
  int64_t bytes_needed() const;
  Status too_large(const std::string& why) const;
  Status claim_memory();
  Status allocate();
  char* memory_of(const Wanted& p);
  Status fill();
  Status pack_from_file(const Wanted& p);
  void pack(const Wanted& p, int64_t begin, int64_t end, const char* rows);
  int64_t put(const Wanted& p, const Rows& part, const char* raw, char* to) const;

  ModelWeights& m_;
  const ModelSpec& spec_;
  const LoadOptions& options_;
  int64_t read_bytes_;
  std::vector<Wanted> wanted_;
  std::set<std::string> used_;
  Status status_;
};

}  // namespace narrows
