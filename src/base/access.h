// The way from the public classes to what is behind them, for the library itself and its tests. What Impl is,
// the folder that defines it says: text/tokenizer_impl.h, engine/model_parts.h, engine/session_impl.h.
#pragma once

#include "narrows/engine.h"

namespace narrows {

class Access {
 public:
  using TokenizerImpl = Tokenizer::Impl;
  static const Tokenizer::Impl& impl(const Tokenizer& tokenizer) { return *tokenizer.impl_; }
  static const Model::Impl& impl(const Model& model) { return *model.impl_; }
  static Session::Impl& impl(Session& session) { return *session.impl_; }
  static const Session::Impl& impl(const Session& session) { return *session.impl_; }
};

}  // namespace narrows
