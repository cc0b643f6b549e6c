// Continues a text with the likeliest tokens, through the C++ API:
//
//   generate_cpp MODEL.gguf "Once upon a time" [TOKENS [PROFILE]]
//
// The text goes to standard output, what it took to standard error. Exit codes: 0 done, 1 it failed, 2 usage.
#include <cstdlib>
#include <iostream>

#include "narrows/engine.h"
#include "narrows/sampling.h"

using namespace narrows;

namespace {

Status generate(const std::string& path, const std::string& prompt, int64_t n_tokens, const std::string& kv) {
  Result<std::shared_ptr<const Model>> model = Model::load(path);
  if (!model.ok()) return model.status();
  const Tokenizer& tokenizer = (*model)->tokenizer();

  Result<KvProfile> profile = KvProfile::parse(kv);
  if (!profile.ok()) return profile.status();
  SessionOptions options;
  options.kv = *profile;
  Result<std::unique_ptr<Session>> made = Session::create(*model, options);
  if (!made.ok()) return made.status();
  Session& session = **made;

  SamplerOptions sampling;
  sampling.temperature = 0;
  Result<std::unique_ptr<Sampler>> sampler = Sampler::create(sampling);
  if (!sampler.ok()) return sampler.status();

  Result<std::vector<Token>> tokens = tokenizer.encode(prompt, true, false);
  if (!tokens.ok()) return tokens.status();
  if (Status s = session.prefill(*tokens); !s.ok()) return s;
  for (int64_t i = 0; i < n_tokens; ++i) {
    const Result<Token> token = (*sampler)->sample(session.logits());
    if (!token.ok()) return token.status();
    if (tokenizer.is_end(*token)) break;
    std::cout << tokenizer.piece(*token);
    if (Status s = session.decode(*token); !s.ok()) return s;
  }
  std::cout << std::endl;
  const CacheStats stats = session.cache_stats();
  std::cerr << stats.n_tokens << " tokens in " << stats.bytes << " bytes of cache (f16: " << stats.bytes_f16
            << ")\n";
  return {};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: " << argv[0] << " MODEL.gguf PROMPT [TOKENS [PROFILE]]\n";
    return 2;
  }
  const Status status = generate(argv[1], argv[2], argc > 3 ? std::strtol(argv[3], nullptr, 10) : 64,
                                 argc > 4 ? argv[4] : kDefaultProfile);
  if (status.ok()) return 0;
  std::cerr << status.message() << "\n";
  return 1;
}
