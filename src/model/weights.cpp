#include "model/weights.h"

#include <fmt/format.h>

namespace narrows {

std::vector<const Matrix*> LayerWeights::matrices() const {
  std::vector<const Matrix*> all;
  for (const Matrix& m : delta_in) {
    if (m) all.push_back(&m);
  }
  for (const Matrix* m : {&wqkv, &wq, &wk, &wv, &wgate, &wo, &gate_up, &gate, &up, &down}) {
    if (*m) all.push_back(m);
  }
  if (router) all.push_back(&router);
  for (const ExpertWeights& e : experts) {
    for (const Matrix* m : {&e.gate_up, &e.gate, &e.up, &e.down}) {
      if (*m) all.push_back(m);
    }
  }
  return all;
}

Status ModelWeights::embed(std::span<const Token> tokens, float* out) const {
  const int64_t row_bytes = embedding_.row_bytes();
  std::vector<char> row(static_cast<size_t>(row_bytes));
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= spec_.n_vocab) {
      return {StatusCode::invalid_argument,
              fmt::format("token {} is outside the vocabulary of {}", tokens[i], spec_.n_vocab)};
    }
    if (Status s = file_.read(embedding_, tokens[i] * row_bytes, row_bytes, row.data()); !s.ok()) return s;
    float* x = out + static_cast<int64_t>(i) * spec_.n_embd;
    to_float(embedding_.type, row.data(), x, spec_.n_embd);
    if (spec_.embedding_scale != 1) {
      for (int64_t c = 0; c < spec_.n_embd; ++c) x[c] *= spec_.embedding_scale;
    }
  }
  return file_.unchanged();
}

int64_t ModelWeights::allocated_bytes() const {
  return matrices_.size() + vectors_.size() * static_cast<int64_t>(sizeof(float));
}

}  // namespace narrows
